"""Builds the CPU extensions: one module per instruction set from the same sources (csrc/cpu).

No torch at build time: the extensions take raw pointers. Without a working C++ compiler the install
still succeeds and the package serves every call through its `reference` backend.
"""

import os
import platform
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

MSVC = sys.platform == "win32"
X86 = platform.machine().lower() in ("x86_64", "amd64", "x64")
ARM = platform.machine().lower() in ("aarch64", "arm64")

# Instruction set -> flags for gcc and clang, flags for MSVC. Best last.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_ISAS = {
    "baseline": ([], []),
    "avx2": (AVX2, ["/arch:AVX2", "/D__FMA__", "/D__F16C__"]),
    "avx512": (AVX512, ["/arch:AVX512", "/D__FMA__", "/D__F16C__"]),
    "avx512bf16": (
        [*AVX512, "-mavx512bf16"],
        ["/arch:AVX512", "/D__FMA__", "/D__F16C__", "/D__AVX512BF16__"],
    ),
}
ARM_ISAS = {"neon": ([], [])}
ISAS = X86_ISAS if X86 else ARM_ISAS if ARM else {"baseline": ([], [])}

COMMON = (
    ["/O2", "/std:c++17", "/EHsc", "/fp:precise"]
    if MSVC
    else ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-g0"]
)


SANITIZE = os.environ.get("FASTATTN_SANITIZE")  # for example "address,undefined"
DEBUG = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1"] if SANITIZE else []
STRIP = [] if MSVC or sys.platform == "darwin" or SANITIZE else ["-s"]
GIGABYTES_PER_JOB = 1.0


def extensions() -> list[Extension]:
    return [
        Extension(
            f"fastattn._cpu_{isa}",
            sources=["csrc/cpu/module.cpp"],
            include_dirs=["csrc/common", "csrc/cpu", pybind11.get_include()],
            define_macros=[("FASTATTN_MODULE", f"_cpu_{isa}"), ("FASTATTN_ISA", f'"{isa}"')],
            extra_compile_args=COMMON + flags[MSVC] + DEBUG,
            extra_link_args=DEBUG + STRIP,
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            language="c++",
            optional=True,  # a compiler too old for one instruction set still builds the others
        )
        for isa, flags in ISAS.items()
    ]


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

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or jobs()

    def run(self) -> None:
        self.reason = "" if self.compiler_works() else "no C++ compiler at install"
        if self.reason:
            print(f"fastattn: {self.reason}; every call will use the reference backend")
            self.extensions = []
        super().run()
        self.write_build_info()

    def compiler_works(self) -> bool:
        compiler = new_compiler(compiler=self.compiler)
        customize_compiler(compiler)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <thread>\nint main() { return 0; }\n")
            try:
                compiler.compile([str(source)], output_dir=folder, extra_postargs=COMMON)
            except (CCompilerError, ExecError, PlatformError, OSError) as error:
                print(f"fastattn: the compiler failed its probe: {error}")
                return False
        return True

    def write_build_info(self) -> None:
        root = Path(".") if self.inplace else Path(self.build_lib)
        built = [
            ext.name.removeprefix("fastattn._cpu_")
            for ext in self.extensions
            if Path(self.get_ext_fullpath(ext.name)).exists()
        ]
        reason = self.reason or ("" if built else "the C++ compiler could not build any extension")
        compiler = getattr(self.compiler, "compiler_cxx", None) or getattr(
            self.compiler, "compiler", []
        )
        info = root / "fastattn" / "_build_info.py"
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(
            '"""Written by setup.py: what the install built."""\n\n'
            f"CPU_ISAS = {built!r}\nREASON = {reason!r}\nCOMPILER = {' '.join(compiler)!r}\n"
        )


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
