"""Builds the extensions: of csrc/cpu one module per instruction set, of csrc/cuda one where nvcc is
(FASTATTN_CUDA=0: not even there; 1: it has to be).

No torch at build time: the extensions see its tensors through DLPack's C interface. Without a
working C++ compiler the install still succeeds and the package serves every call through its
`reference` backend.
"""

import copy
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

MSVC = sys.platform == "win32"
X86 = platform.machine().lower() in ("x86_64", "amd64", "x64")
ARM = platform.machine().lower() in ("aarch64", "arm64")

# Instruction set -> (flags for gcc and clang, flags for MSVC).
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
MSVC_FMA = ["/D__FMA__", "/D__F16C__"]  # implied by /arch:AVX2, but MSVC does not define them
X86_ISAS = {
    "baseline": (["-O2"], []),  # the last resort, compiled in two thirds of the time
    "avx2": (AVX2, ["/arch:AVX2", *MSVC_FMA]),
    "avx512": (AVX512, ["/arch:AVX512", *MSVC_FMA]),
    "avx512bf16": ([*AVX512, "-mavx512bf16"], ["/arch:AVX512", *MSVC_FMA, "/D__AVX512BF16__"]),
}
FLAGS = X86_ISAS if X86 else {"neon": ([], [])} if ARM else {"baseline": ([], [])}
wanted = os.environ.get("FASTATTN_BUILD_ISAS")  # for example "avx2": a quick build to try
ISAS = wanted.split(",") if wanted else list(FLAGS)

# Compiled once for any processor, and linked into every module: the binding.
BINDING = "csrc/cpu/module.cpp"
# In float64: a third of what there is to compile, so that some instruction sets share it.
FLOAT64 = "csrc/cpu/float64.cpp"
FLOAT64_OF = {"avx512": "avx2", "avx512bf16": "avx2"}
# Compiled once per instruction set, with its flags.
KERNELS = sorted({p.as_posix() for p in Path("csrc/cpu").glob("*.cpp")} - {BINDING, FLOAT64})

# The CUDA module: code for sm_80 and what can run it, for sm_90, and PTX for what comes later.
CUDA = os.environ.get("FASTATTN_CUDA", "auto")
CUDA_BINDING = "csrc/cuda/module.cpp"
CUDA_KERNELS = sorted(p.as_posix() for p in Path("csrc/cuda").glob("*.cu"))
HEAD_DIMS = re.findall(r"f\((\d+)\)", Path("csrc/cuda/head_dims.h").read_text())
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-Icsrc/common", "-Icsrc/cuda"),
    *("-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"),
    *("-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"),
]
OLDEST_NVCC = (12, 4)

COMMON = (
    ["/O2", "/std:c++17", "/EHsc"]
    if MSVC
    else ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-g0"]
)
SANITIZE = os.environ.get("FASTATTN_SANITIZE")  # for example "address,undefined"
DEBUG = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-O1", "-g1"] if SANITIZE else []
STRIP = [] if MSVC or sys.platform == "darwin" or SANITIZE else ["-s"]

# Not setuptools' own folder, which is a new one for each editable install: what was compiled before
# is found again. Objects of another Python or platform are others.
OBJECTS = Path("build", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
RULE = ["description = $out"]
if MSVC:
    RULE += ["command = $line /showIncludes", "deps = msvc"]
else:  # not every compiler that fails takes away an older object, which must not be linked
    # What a compiler says is kept beside the object, and shown.
    command = "($line -MMD -MF $out.d 2>&1 || rm -f $out) > $out.log; cat $out.log; test -e $out"
    RULE += [f"command = {command}", "deps = gcc", "depfile = $out.d"]
GIGABYTES_PER_JOB = 1.0
Command = tuple[str, str, list[str]]  # source, object, the compiler and its arguments


def jobs() -> int:
    """Compilers to run at once: no more than the cores, nor than the free memory holds."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        kilobytes = re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[0]
    except (OSError, IndexError):
        return cores
    return max(1, min(cores, int(int(kilobytes) / 2**20 / GIGABYTES_PER_JOB)))


class Toolkit:
    """nvcc and what it links: of CUDA_HOME, of PATH, or of NVIDIA's wheels for Python."""

    def __init__(self) -> None:
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
        homes += [os.path.join(path, "nvidia", "cu13") for path in sys.path]
        found = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes]
        found.insert(len(found) - len(sys.path), shutil.which("nvcc"))
        self.nvcc = next(filter(None, found), "")
        self.version = self.home = ""
        if self.nvcc and not MSVC:
            lines = self.ask("--version") + self.ask("--dryrun", "-x", "cu", os.devnull)
            self.version = "".join(re.findall(r"release ([\d.]+)", lines)[:1])
            self.home = "".join(re.findall(r"^#\$ TOP=(.*)$", lines, re.M)[:1])

    def ask(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr

    def obstacle(self) -> str:
        """Why there will be no CUDA module; empty when there can be one."""
        if CUDA == "0" or SANITIZE:
            return "FASTATTN_CUDA=0 at install" if CUDA == "0" else "built with a sanitizer"
        if not self.nvcc or MSVC:
            return "no nvcc at install"
        if not self.home or tuple(map(int, self.version.split("."))) < OLDEST_NVCC:
            return f"needs nvcc {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer (got {self.version})"
        return "" if self.cudart() else "no libcudart_static.a at install"

    def cudart(self) -> str:
        """The runtime, which is linked statically: the module imports where there is no driver."""
        folders = (Path(self.home, name) for name in ("lib64", "lib"))
        return next((str(p) for f in folders for p in f.glob("libcudart_static.a")), "")


class BuildExtensions(build_ext):
    """Builds what the compilers can, and leaves a record of it in fastattn/_build_info.py."""

    def run(self) -> None:
        super().run()
        if self.inplace:
            info = Path("fastattn", "_build_info.py")
            self.copy_file(os.path.join(self.build_lib, info), str(info))

    def build_extensions(self) -> None:
        for old in Path(self.build_lib, "fastattn").glob("_c[pu][ud]*"):  # of an earlier build
            old.unlink()
        self.cuda_reason = "no C++ compiler at install"
        self.cuda_warnings: list[str] | None = None
        reason = self.obstacle()
        if reason:
            print(f"fastattn: {reason}; every call will use the reference backend")
            self.extensions: list[Extension] = []
        else:
            self.extensions = self.build_all()
            if not self.extensions:
                reason = "the C++ compiler could not build any extension"
        self.check_cuda()
        self.write_build_info(reason)

    def check_cuda(self) -> None:
        if CUDA == "1" and self.cuda_reason:
            raise SystemExit(f"fastattn: FASTATTN_CUDA=1, but: {self.cuda_reason}")

    def obstacle(self) -> str:
        """Why nothing can be compiled here, found out in a second; empty when it can."""
        if self.compiles("#include <Python.h>\n#include <thread>"):
            return ""
        if self.compiles("#include <thread>"):
            return "no Python.h at install (a package such as python3-dev has it)"
        return "no C++ compiler at install"

    def compiles(self, lines: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(f"{lines}\nint main() {{ return 0; }}\n")
            return self.succeeds(
                self.compiler.compile, [str(source)], output_dir=folder, extra_postargs=COMMON
            )

    def succeeds(self, step: Any, *arguments: Any, **options: Any) -> bool:
        try:
            step(*arguments, **options)
        except (CCompilerError, ExecError, PlatformError, OSError, subprocess.SubprocessError) as e:
            print(f"fastattn: {e}")
            return False
        return True

    def build_all(self) -> list[Extension]:
        binding = self.commands([BINDING], "any", [])
        kernels = [self.kernel_commands(isa) for isa in ISAS]
        toolkit = Toolkit()
        self.cuda_reason = toolkit.obstacle()
        self.check_cuda()
        cuda = [] if self.cuda_reason else self.cuda_commands(toolkit)
        self.compile_all(sum(kernels, start=binding + cuda))
        logs = [Path(f"{obj}.log") for source, obj, _ in cuda if source != CUDA_BINDING]
        if logs and all(map(Path.exists, logs)):
            self.cuda_warnings = [text for log in logs if (text := log.read_text().strip())]
        built = []
        parts = [binding + commands for commands in kernels] + [cuda]
        for ext, commands in zip(self.extensions, parts, strict=True):
            objects = [obj for _, obj, _ in commands]
            libraries = [toolkit.cudart(), "-ldl", "-lrt", "-lpthread"] if commands is cuda else []
            complete = bool(objects) and all(map(os.path.exists, objects))
            # A compiler too old for one instruction set still builds the others.
            if complete and self.succeeds(self.link, ext, objects, libraries):
                built.append(ext)
                continue
            if commands is cuda:
                self.cuda_reason = self.cuda_reason or "nvcc could not build it"
            print(f"fastattn: {ext.name} was not built")
        return built

    def kernel_commands(self, isa: str) -> list[Command]:
        """All that a module links beside the binding."""
        own = self.commands(KERNELS, isa, FLAGS[isa][MSVC])
        shared = FLOAT64_OF.get(isa, isa)
        return own + self.commands([FLOAT64], shared, FLAGS[shared][MSVC])

    def cuda_commands(self, toolkit: Toolkit) -> list[Command]:
        """The binding by the host's compiler, the kernels by nvcc, attention's once a head dim."""
        commands = self.commands([CUDA_BINDING], "any", [f"-I{toolkit.home}/include"])
        for source in CUDA_KERNELS:
            each = HEAD_DIMS if "FASTATTN_HEAD_DIM" in Path(source).read_text() else [""]
            for head_dim in each:
                obj = OBJECTS / "cuda" / f"{Path(source).stem}{head_dim}.o"
                obj.parent.mkdir(parents=True, exist_ok=True)
                flags = [f"-DFASTATTN_HEAD_DIM={head_dim}"] if head_dim else []
                line = [toolkit.nvcc, *NVCC_FLAGS, *flags, "-c", source, "-o", str(obj)]
                commands.append((source, obj.as_posix(), line))
        return commands

    def commands(self, sources: list[str], isa: str, flags: list[str]) -> list[Command]:
        """What setuptools would call to compile these."""
        lines: list[list[str]] = []
        recorder: Any = copy.copy(self.compiler)
        recorder.call = recorder.spawn = lines.append  # older versions of setuptools call spawn
        objects = recorder.compile(
            sources,
            output_dir=str(OBJECTS / isa),
            # Only the binding depends on where pybind11 is: in isolation, elsewhere each time.
            include_dirs=["csrc/common", "csrc/cpu"] + [pybind11.get_include()] * (isa == "any"),
            macros=[("FASTATTN_ISA", f'"{isa}"')],
            extra_postargs=COMMON + flags + DEBUG,
        )
        return list(zip(sources, objects, lines, strict=True))

    def compile_all(self, commands: list[Command]) -> None:
        """Goes on after a failure: whoever links sees which objects there are."""
        commands = list({command[1]: command for command in commands}.values())  # each object once
        run = getattr(self.compiler, "call", None) or self.compiler.spawn
        at_once = self.parallel or jobs()
        folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
        ninja = shutil.which("ninja", path=os.pathsep.join(folders))
        if not ninja:  # without build isolation: no more than that everything is compiled anew
            for _, obj, _ in commands:
                Path(obj).unlink(missing_ok=True)
                Path(f"{obj}.log").unlink(missing_ok=True)
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(lambda command: self.succeeds(run, command[2]), commands))
            return
        quote = subprocess.list2cmdline if MSVC else shlex.join
        text = f"builddir = {OBJECTS}\nrule compile\n" + "".join(f"  {line}\n" for line in RULE)
        for source, obj, line in sorted(commands):  # by name: the longest happen to come first
            text += f"build {obj}: compile {source}\n  line = {quote(line).replace('$', '$$')}\n"
        script = OBJECTS / "build.ninja"
        script.write_text(text)
        self.succeeds(run, [ninja, "-f", str(script), "-k", "0", "-j", str(at_once)])

    def link(self, ext: Extension, objects: list[str], libraries: list[str]) -> None:
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=libraries + DEBUG + STRIP,
            export_symbols=self.get_export_symbols(ext),
            build_temp=str(OBJECTS),
            target_lang="c++",
        )

    def write_build_info(self, reason: str) -> None:
        names = [ext.name.removeprefix("fastattn._cpu_") for ext in self.extensions]
        names = [name for name in names if name in ISAS]
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["msvc"]
        info = Path(self.build_lib, "fastattn", "_build_info.py")
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(
            '"""Written by setup.py: what the install built."""\n\n'
            f"CPU_ISAS = {names!r}\nREASON = {reason!r}\nCOMPILER = {compiler[0]!r}\n"
            f"CUDA_REASON = {self.cuda_reason!r}\n"
            f"CUDA_WARNINGS: list[str] | None = {self.cuda_warnings!r}\n"
        )


setup(
    ext_modules=[Extension(f"fastattn._cpu_{isa}", [BINDING, *KERNELS]) for isa in ISAS]
    + [Extension("fastattn._cuda", [CUDA_BINDING, *CUDA_KERNELS])],
    cmdclass={"build_ext": BuildExtensions},
)
