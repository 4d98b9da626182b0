"""Builds the CPU extensions: one module per instruction set from the same sources (csrc/cpu).

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
    "baseline": ([], []),
    "avx2": (AVX2, ["/arch:AVX2", *MSVC_FMA]),
    "avx512": (AVX512, ["/arch:AVX512", *MSVC_FMA]),
    "avx512bf16": ([*AVX512, "-mavx512bf16"], ["/arch:AVX512", *MSVC_FMA, "/D__AVX512BF16__"]),
}
ISAS = X86_ISAS if X86 else {"neon": ([], [])} if ARM else {"baseline": ([], [])}
if wanted := os.environ.get("FASTATTN_BUILD_ISAS"):  # for example "avx2": a quick build to try
    ISAS = {isa: ISAS[isa] for isa in wanted.split(",")}

# Compiled once for any processor, and linked into every module: the binding.
BINDING = "csrc/cpu/module.cpp"
# Compiled once per instruction set, with its flags.
KERNELS = sorted(p.as_posix() for p in Path("csrc/cpu").glob("*.cpp") if p.name != "module.cpp")

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
    RULE += ["command = $line -MMD -MF $out.d || (rm -f $out; false)"]
    RULE += ["deps = gcc", "depfile = $out.d"]
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


class BuildExtensions(build_ext):
    """Builds what the compiler can, and leaves a record of it in fastattn/_build_info.py."""

    def run(self) -> None:
        super().run()
        if self.inplace:
            info = Path("fastattn", "_build_info.py")
            self.copy_file(os.path.join(self.build_lib, info), str(info))

    def build_extensions(self) -> None:
        for old in Path(self.build_lib, "fastattn").glob("_cpu_*"):  # of an earlier build
            old.unlink()
        reason = self.obstacle()
        if reason:
            print(f"fastattn: {reason}; every call will use the reference backend")
            self.extensions: list[Extension] = []
        else:
            self.extensions = self.build_all()
            if not self.extensions:
                reason = "the C++ compiler could not build any extension"
        self.write_build_info(reason)

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
        kernels = [self.commands(KERNELS, isa, flags[MSVC]) for isa, flags in ISAS.items()]
        self.compile_all(sum(kernels, start=binding))
        built = []
        for ext, commands in zip(self.extensions, kernels, strict=True):
            objects = [obj for _, obj, _ in binding + commands]
            # A compiler too old for one instruction set still builds the others.
            if all(map(os.path.exists, objects)) and self.succeeds(self.link, ext, objects):
                built.append(ext)
            else:
                print(f"fastattn: {ext.name} was not built")
        return built

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
        run = getattr(self.compiler, "call", None) or self.compiler.spawn
        at_once = self.parallel or jobs()
        folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
        ninja = shutil.which("ninja", path=os.pathsep.join(folders))
        if not ninja:  # without build isolation: no more than that everything is compiled anew
            for _, obj, _ in commands:
                Path(obj).unlink(missing_ok=True)
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

    def link(self, ext: Extension, objects: list[str]) -> None:
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=DEBUG + STRIP,
            export_symbols=self.get_export_symbols(ext),
            build_temp=str(OBJECTS),
            target_lang="c++",
        )

    def write_build_info(self, reason: str) -> None:
        names = [ext.name.removeprefix("fastattn._cpu_") for ext in self.extensions]
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["msvc"]
        info = Path(self.build_lib, "fastattn", "_build_info.py")
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(
            '"""Written by setup.py: what the install built."""\n\n'
            f"CPU_ISAS = {names!r}\nREASON = {reason!r}\nCOMPILER = {compiler[0]!r}\n"
        )


setup(
    ext_modules=[Extension(f"fastattn._cpu_{isa}", [BINDING, *KERNELS]) for isa in ISAS],
    cmdclass={"build_ext": BuildExtensions},
)
