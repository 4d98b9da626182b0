"""What differs where a GPU is timed: the clock, the ceilings, the facts about the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .ceilings import Ceilings
from .timing import Call

GEMM_SIZE, COPY_BYTES = 8192, 2**30
FILLER_BYTES = 2**27  # at least, or twice the second-level cache
WARM_UP, RUNS = 5, 20
AHEAD_CYCLES = 1_000_000  # about half a millisecond a call: what the host may take to launch it


def unavailable() -> str | None:
    """Why nothing can be timed on a GPU here, or None."""
    return None if torch.cuda.is_available() else "no CUDA or HIP device (torch sees none)"


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Stopwatch:
    """Seconds of the device alone, by events around each call.

    A call finds none of its data in cache, since a large buffer is written before it; and the
    device is kept waiting before the first, so that the host is ahead and no launch is timed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.filler = torch.empty(max(2 * cache, FILLER_BYTES), dtype=torch.int8, device=device)

    def sample(self, call: Call, repeats: int) -> float:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(AHEAD_CYCLES * repeats)
        for begin, end in marks:
            self.filler.zero_()
            begin.record()  # type: ignore[no-untyped-call]
            call()
            end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)
        return 1e-3 * sum(begin.elapsed_time(end) for begin, end in marks) / repeats


def measure_ceilings(stopwatch: Stopwatch) -> Ceilings:
    """GEMM of each dtype, float32's in true float32, and a copy; the best of several runs."""

    def best(call: Call) -> float:
        stopwatch.sample(call, WARM_UP)
        return min(stopwatch.sample(call, 1) for _ in range(RUNS))

    device = stopwatch.device
    gemm = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = best(partial(torch.mm, a, b, out=out))
        gemm[str(dtype).removeprefix("torch.")] = 2e-9 * GEMM_SIZE**3 / seconds
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return Ceilings(gemm, 2e-9 * source.nbytes / best(lambda: target.copy_(source)))


def describe(device: torch.device) -> dict[str, Any]:
    """The device and what drives it, for the head of a report."""
    from .machine import version_of

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_gb": properties.total_memory / 1e9,
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "triton": version_of("triton"),
        "liger": version_of("liger-kernel"),
    }
