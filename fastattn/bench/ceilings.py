"""What this machine can do at most, measured: bare multiply-adds of each dtype, and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ..backends.cpu import CpuBackend
from .results import Result


@dataclass(frozen=True)
class Ceilings:
    """GFLOP/s of arithmetic by dtype: of multiply-adds that load nothing, or of torch's GEMM where
    that is faster; and GB/s (read plus written) of a 256 MB copy."""

    arithmetic: dict[str, float]
    copy: float

    def compute(self, dtype: str) -> float:
        """The roof for arithmetic in `dtype`. Narrow types may be widened, so it is never under
        float32's: where the machine has no bfloat16 instructions, torch's GEMM is not a roof."""
        roofs = [self.arithmetic[dtype]] if dtype in self.arithmetic else []
        if dtype != "float64":
            roofs.append(self.arithmetic["float32"])
        return max(roofs)

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, one by one."""
        rates = self.arithmetic.items()
        arithmetic = {dtype: max(rate, other.arithmetic[dtype]) for dtype, rate in rates}
        return Ceilings(arithmetic, max(self.copy, other.copy))

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
    cpu = CpuBackend()
    arithmetic = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Without instructions for a dtype torch's GEMM can be a hundred times slower; such a
        # number is no ceiling, so a small product decides whether the large one is worth it.
        rate = _gemm(dtype, 192, budget_s / 8)
        if rate > 20:
            rate = _gemm(dtype, 1536, budget_s)
        rate = max(rate, 1e-9 * cpu.multiply_add_rate(dtype))
        arithmetic[str(dtype).removeprefix("torch.")] = rate
    source = torch.ones(1 << 26)
    target = torch.zeros_like(source)
    copy_s = best_of(lambda: target.copy_(source), budget_s)
    return Ceilings(arithmetic, 2e-9 * source.nbytes / copy_s)
