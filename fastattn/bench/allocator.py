"""Keep page faults out of the timings, for both sides alike.

glibc gives large freed blocks back to the system and gets the next output as fresh pages, whose
first touch costs more than many a kernel: a 64 MB layer norm then reads 3 GB/s instead of 20.
Told never to do so, it reuses the same memory. Benchmarks of the default behaviour run in a child
process, which does not inherit these settings.
"""

from __future__ import annotations

import ctypes
import platform
import time
from typing import Any

import torch

# mallopt's parameters, <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def reuse_memory() -> bool:
    """Serve every allocation from the heap and never shrink it. False where this is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))
    accepted = [libc.mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)


def trim() -> None:
    """Give free memory back, so that a peak measured from here is the peak of what follows."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def describe(reused: bool) -> dict[str, Any]:
    """Which settings hold, and what they do: faults and time of the third fresh 64 MB output."""
    report: dict[str, Any] = {
        "reuse_memory": reused,
        "settings": "mallopt M_MMAP_MAX=0 M_TRIM_THRESHOLD=-1 M_TOP_PAD=64MiB" if reused else None,
    }
    try:
        import resource
    except ImportError:  # Windows
        return report
    source = torch.zeros(1 << 24)
    for _ in range(3):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        source.clone()
        report["clone_64mb_ms"] = 1e3 * (time.perf_counter() - start)
        report["clone_64mb_faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return report
