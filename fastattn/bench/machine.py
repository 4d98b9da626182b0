"""What the machine is and has: for `fastattn info` and for the head of every report."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

# The instruction sets that decide which kernel is fastest, by the names of /proc/cpuinfo.
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


def cpu_name(fields: dict[str, str]) -> str:
    name = fields.get("model name") or platform.processor() or platform.machine()
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout this package is imported from, or, if it is installed, of the one
    it was called from (`make bench` installs that one first). None outside any checkout."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / ".git").exists() and (root / "fastattn" / "cases.py").exists():
            break
    else:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def describe() -> dict[str, Any]:
    """Machine, versions and commit, as the JSON report keeps them."""
    fields = cpu_fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(fields),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory_gb(),
        "gpu": gpu,
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fastattn": __version__,
        "commit": git_commit(),
    }


class Others:
    """How busy other processes keep this machine, from when this was made."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def share(self) -> float | None:
        """Of all processors' time since then, what neither idled nor was ours (with children that
        have ended). None where /proc/stat does not tell."""
        if self._start is None or (now := self._seconds()) is None:
            return None
        busy, ours, wall = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy - ours) / max(wall * (os.cpu_count() or 1), 1e-9)

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _wait, *more = map(int, fields)
        busy = user + nice + system + sum(more[:3])  # interrupts and what a hypervisor took
        return busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), time.monotonic()


def build_record() -> dict[str, Any]:
    """What the install built, with which compiler, and which of it this CPU runs, best first."""
    from ..backends.cpu import ISAS, CpuBackend

    try:
        record = importlib.import_module("fastattn._build_info")
    except ModuleNotFoundError:
        return {"isas": [], "usable": [], "reason": "nothing was built", "compiler": None}
    module = CpuBackend().module
    runs = module.usable_isas() if module else ()
    built = [isa for isa in record.CPU_ISAS if find_spec(f"fastattn._cpu_{isa}")]
    return {
        "isas": built,
        "usable": [isa for isa in ISAS if isa in built and isa in runs],
        "reason": record.REASON,
        "compiler": getattr(record, "COMPILER", None),
    }
