"""What this machine can do at most, measured through torch: GEMM of each dtype, and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .results import Result


@dataclass(frozen=True)
class Ceilings:
    """GFLOP/s of a square GEMM by dtype, and GB/s (read plus written) of a 256 MB copy."""

    gemm: dict[str, float]
    copy: float

    def compute(self, dtype: str) -> float:
        """The roof for arithmetic in `dtype`. Narrow types may be widened, so it is never under
        float32's: where the machine has no bfloat16 instructions, torch's GEMM is not a roof."""
        roofs = [self.gemm[dtype]] if dtype in self.gemm else []
        if dtype != "float64":
            roofs.append(self.gemm["float32"])
        return max(roofs)

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, one by one."""
        gemm = {dtype: max(rate, other.gemm[dtype]) for dtype, rate in self.gemm.items()}
        return Ceilings(gemm, max(self.copy, other.copy))

    def hold_against(self, result: Result) -> None:
        """Say which roof is over a result and how near it came."""
        if not result.intensity:
            return
        compute = self.compute(result.dtype)
        # Row-wise ops count as limited by memory even where their exponentials cost more.
        rows = result.op != "attention"
        result.bound = "memory" if rows or result.intensity * self.copy < compute else "compute"
        achieved = result.gbytes if result.bound == "memory" else result.gflops
        result.of_ceiling = achieved / (self.copy if result.bound == "memory" else compute)

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def best_of(call: Callable[[], object], budget_s: float) -> float:
    """The shortest of the runs that fit in the budget, at least three."""
    call()
    end = time.perf_counter() + budget_s
    times: list[float] = []
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _gemm(dtype: torch.dtype, size: int, budget_s: float) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty_like(a)
    return 2e-9 * size**3 / best_of(lambda: torch.mm(a, b, out=out), budget_s)


def measure(budget_s: float = 0.4) -> Ceilings:
    gemm = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Without instructions for a dtype torch's GEMM can be a hundred times slower; such a
        # number is no ceiling, so a small product decides whether the large one is worth it.
        rate = _gemm(dtype, 192, budget_s / 8)
        if rate > 20:
            rate = _gemm(dtype, 1536, budget_s)
        gemm[str(dtype).removeprefix("torch.")] = rate
    source = torch.ones(1 << 26)
    target = torch.zeros_like(source)
    copy_s = best_of(lambda: target.copy_(source), budget_s)
    return Ceilings(gemm, 2e-9 * source.nbytes / copy_s)
