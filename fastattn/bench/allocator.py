"""Keep page faults out of the timings, for both sides alike.

glibc gives large freed blocks back to the system and gets the next output as fresh pages, whose
first touch costs more than many a kernel: a 64 MB layer norm then reads 3 GB/s instead of 20.
Told never to do so, it reuses the same memory. Benchmarks of the default behaviour run in a child
process, which does not inherit these settings.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from typing import Any

import torch

# mallopt's parameters, <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
HEAP = 2**30  # bytes of heap to touch beforehand


def reuse_memory() -> bool:
    """Serve every allocation from a heap that was touched once and never shrinks. False where this
    is not glibc.

    Without touching it first the faults last on: an aligned allocation asks for a little more than
    it needs, so it does not fit where one of its size was freed, and moves up into fresh pages.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    accepted = [libc.mallopt(parameter, value) == 1 for parameter, value in settings]
    if all(accepted):
        torch.empty(min(HEAP, available_memory() // 4), dtype=torch.uint8).fill_(1)
    return all(accepted)


def available_memory() -> int:
    """Bytes of memory that nobody uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give free memory back, so that a peak measured from here is the peak of what follows."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def describe(reused: bool) -> dict[str, Any]:
    """Which settings hold, and what they do: the faults and time of a fresh 64 MB output."""
    report: dict[str, Any] = {
        "reuse_memory": reused,
        "settings": "mallopt M_MMAP_MAX=0 M_TRIM_THRESHOLD=-1, heap touched" if reused else None,
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
