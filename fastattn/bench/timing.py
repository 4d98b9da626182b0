"""Interleaved timing: contenders take turns, so that a slow second of the machine hits them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

Call = Callable[[], object]

SHORTEST_SAMPLE_S = 2e-3
MIN_ROUNDS, MAX_ROUNDS, GUEST_ROUNDS = 5, 60, 3
SLOW_S = 1.0  # a call that takes longer is called less often


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the least and the most of the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def _sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(
    calls: dict[str, Call],
    budget_s: float,
    guests: frozenset[str] = frozenset(),
    sample: Callable[[Call, int], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of every contender, by round: A B C, then C B A, then A B C ... ``sample``:
    seconds a call of so many calls, by another clock than the CPU's.

    Rounds go on for about `budget_s`. Guests, which may be many times slower and whose ratio
    nobody's goal depends on, take part in the first three only.
    """
    sample = sample or _sample
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    least = MIN_ROUNDS
    for name, call in calls.items():
        seconds = sample(call, 1)  # warm up: threads, workspaces, pages
        if seconds < 0.05:
            seconds = sample(call, 1)
        if seconds > SLOW_S and name in guests:
            samples[name].append(seconds)  # its warming up is lost in that: once must do
            continue
        if seconds > SLOW_S:
            least = GUEST_ROUNDS
        repeats[name] = max(1, round(SHORTEST_SAMPLE_S / max(seconds, 1e-7)))
    names = list(repeats)
    enabled = gc.isenabled()
    gc.disable()
    try:
        spent = 0.0
        for turn in range(MAX_ROUNDS):
            if turn >= least and spent > budget_s:
                break
            for name in names if turn % 2 == 0 else reversed(names):
                if name in guests and turn >= GUEST_ROUNDS:
                    continue
                seconds = sample(calls[name], repeats[name])
                samples[name].append(seconds)
                spent += seconds * repeats[name]
    finally:
        if enabled:
            gc.enable()
    return samples


def ratio(over: list[float], under: list[float]) -> Timing:
    """Median, least and most of over/under, round by round (of the rounds both took part in)."""
    return Timing.of([a / b for a, b in zip(over, under, strict=False)])
