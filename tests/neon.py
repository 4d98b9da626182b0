"""The NEON kernels on an x86 Debian: builds them, and proves them by an Arm Python under qemu.

    python tests/neon.py                                          # fastattn check
    python tests/neon.py -m pytest tests/test_edge_cases.py -k cpu     # anything for that Python

Needs git, apt, qemu-user and g++-aarch64-linux-gnu, and no rights over the system: all that it
downloads (Debian's Arm packages, torch's Arm wheel) and builds lies in build/neon. PIP_FLAGS passes
options to pip, as for make. Times say nothing about Arm.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
FOLDER = HERE / "build" / "neon"
ROOT, SITE, SOURCE = FOLDER / "root", FOLDER / "site", FOLDER / "source"
DEBIAN = ["python3", "libpython3-dev", "libstdc++6"]
WHEELS = ["torch", "numpy", "pytest", "hypothesis", "setuptools", "pybind11"]
# Of a processor without SVE and BF16: torch takes its plain paths, which qemu runs fastest.
CPU = "neoverse-n1"
PYTHON = FOLDER / "python"
SCRIPT = f"""\
#!/bin/sh
exec qemu-aarch64 -cpu {CPU} -L '{ROOT}' \\
  -E PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{SITE}" '{ROOT}/usr/bin/python3' "$@"
"""
CPUINFO = """\
processor\t: {}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


def run(*command: object, **options: Any) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)


def unpack_debian() -> None:
    """ROOT: Python and what it needs, by an apt that knows nothing of this system's packages."""
    apt = FOLDER / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", *options, "update")
    install = ["install", "--yes", "--download-only", "--no-install-recommends"]
    run("apt-get", *options, *install, *DEBIAN)
    for package in (apt / "archives").glob("*.deb"):
        if "-dev_" not in package.name or "python" in package.name:  # the cross-compiler has them
            run("dpkg", "-x", package, ROOT)
    # qemu shows files of ROOT instead of the system's: torch crashes on the cpuinfo of an x86.
    (ROOT / "proc").mkdir()
    cores = range(os.cpu_count() or 1)
    (ROOT / "proc" / "cpuinfo").write_text("".join(map(CPUINFO.format, cores)))
    for core in cores:
        registers = ROOT / f"sys/devices/system/cpu/cpu{core}/regs/identification"
        registers.mkdir(parents=True)
        (registers / "midr_el1").write_text("0x00000000413fd0c1\n")


def install_wheels() -> None:
    version = next(re.findall(r"python(3\.\d+)$", str(p)) for p in ROOT.glob("usr/bin/python3.*"))
    wheels = ["--only-binary=:all:", "--python-version", *version]
    for platform in ("2014", *(f"_2_{glibc}" for glibc in range(17, 29))):
        wheels += ["--platform", f"manylinux{platform}_aarch64"]
    flags = os.environ.get("PIP_FLAGS", "").split()
    pip = [sys.executable, "-m", "pip", "install", *flags, "-c", HERE / "constraints.txt"]
    run(*pip, "--target", SITE, *wheels, *WHEELS)
    # The children of a test are Arm's too.
    (SITE / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(PYTHON)!r}\n")


def main(arguments: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not (ROOT / "proc").exists():
        unpack_debian()
    PYTHON.write_text(SCRIPT)
    PYTHON.chmod(0o755)
    if not (SITE / "sitecustomize.py").exists():
        install_wheels()
    # A copy: what is built in place beside the sources is for this machine.
    SOURCE.mkdir(exist_ok=True)
    files = "git ls-files -z --cached --others --exclude-standard"
    run("sh", "-c", f"{files} | tar -c --null -T - | tar -x -C '{SOURCE}'", cwd=HERE)
    build = {"CPATH": str(ROOT / "usr" / "include"), "FASTATTN_CUDA": "0"}
    setup = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    run(*setup, cwd=SOURCE, env=os.environ | build)
    run(PYTHON, *(arguments or ["-m", "fastattn", "check", "--backend", "cpu"]), cwd=SOURCE)


if __name__ == "__main__":
    main(sys.argv[1:])
