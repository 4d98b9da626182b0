"""Builds the CPU extensions: one module per instruction set from the same sources (csrc/cpu).

No torch at build time: the extensions take raw pointers. Without a working C++ compiler the install
still succeeds and the package serves every call through its `reference` backend.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
KERNELS = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp") if p.name != "module.cpp")

COMMON = (
    ["/O2", "/std:c++17", "/EHsc"]
    if MSVC
    else [
        "-O3",
        "-std=c++17",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-ffp-contract=off",
        "-g0",
    ]
)
SANITIZE = os.environ.get("FASTATTN_SANITIZE")  # for example "address,undefined"
DEBUG = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-O1", "-g1"] if SANITIZE else []
STRIP = [] if MSVC or sys.platform == "darwin" or SANITIZE else ["-s"]
GIGABYTES_PER_JOB = 1.0


def jobs() -> int:
    """Compilers to run at once: no more than the cores, nor than the free memory holds."""
    try:
        cores = len(os.sched_getaffinity(0))
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return os.cpu_count() or 1
    return max(1, min(cores, int(free / GIGABYTES_PER_JOB)))


class BuildExtensions(build_ext):
    """Builds what the compiler can, and leaves a record of it in fastattn/_build_info.py."""

    def build_extensions(self) -> None:
        self.reason = self.obstacle()
        if self.reason:
            print(f"fastattn: {self.reason}; every call will use the reference backend")
            self.extensions: list[Extension] = []
        else:
            self.compile_all()
        self.write_build_info()

    def obstacle(self) -> str:
        """Why nothing can be compiled here, found out in a second; empty when it can."""
        if not self.compiles("#include <thread>"):
            return "no C++ compiler at install"
        if not self.compiles("#include <Python.h>"):
            return "no Python.h at install (a package such as python3-dev has it)"
        return ""

    def compiles(self, line: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(f"{line}\nint main() {{ return 0; }}\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=COMMON)
            except (CCompilerError, ExecError, PlatformError, OSError) as error:
                print(f"fastattn: the compiler failed its probe: {error}")
                return False
        return True

    def compile_all(self) -> None:
        # One pool over every object of every module keeps all cores busy to the end.
        with ThreadPoolExecutor(self.parallel or jobs()) as pool:
            binding = pool.submit(self.compile, BINDING, "any", [])
            kernels = [
                [pool.submit(self.compile, source, isa, flags[MSVC]) for source in KERNELS]
                for isa, flags in ISAS.items()
            ]
            built = []
            for ext, pending in zip(self.extensions, kernels, strict=True):
                try:
                    self.link(ext, [p.result() for p in [binding, *pending]])
                    built.append(ext)
                except (CCompilerError, ExecError) as error:
                    # A compiler too old for one instruction set still builds the others.
                    print(f"fastattn: {ext.name} was not built: {error}")
            self.extensions = built

    def compile(self, source: str, isa: str, flags: list[str]) -> str:
        (built,) = self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, isa),
            include_dirs=["csrc/common", "csrc/cpu", pybind11.get_include()],
            macros=[("FASTATTN_ISA", f'"{isa}"')],
            extra_postargs=COMMON + flags + DEBUG,
        )
        return built

    def link(self, ext: Extension, objects: list[str]) -> None:
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(
            objects,
            target,
            extra_postargs=DEBUG + STRIP,
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def write_build_info(self) -> None:
        names = [ext.name.removeprefix("fastattn._cpu_") for ext in self.extensions]
        reason = self.reason or ("" if names else "the C++ compiler could not build any extension")
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["msvc"]
        info = Path("" if self.inplace else self.build_lib, "fastattn", "_build_info.py")
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(
            '"""Written by setup.py: what the install built."""\n\n'
            f"CPU_ISAS = {names!r}\nREASON = {reason!r}\nCOMPILER = {compiler[0]!r}\n"
        )


setup(
    ext_modules=[Extension(f"fastattn._cpu_{isa}", [BINDING, *KERNELS]) for isa in ISAS],
    cmdclass={"build_ext": BuildExtensions},
)
