"""Run benchmarks: check a case, then time its contenders against each other.

As a program (`python -m fastattn.bench.runner`, a request as JSON on stdin) it does so with the
allocator as users have it, and prints a line of JSON a result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from .. import child, proof
from ..cases import AttentionCase, Case
from . import contenders, timing
from .memory import default_environment
from .results import Result
from .table import BENCHMARKS, Benchmark


@dataclass(frozen=True)
class Options:
    threads: int
    budget_s: float  # of timing, for each benchmark
    backend: str | None = None
    flex: bool = False
    device: str = "cpu"


class Runner:
    """Remembers which cases have passed their check, so that forward and backward share one."""

    def __init__(self, options: Options, sample: Callable[[timing.Call, int], float] | None = None):
        self.options = options
        self._sample = sample  # a clock other than the CPU's
        self._verdicts: dict[tuple[Case, bool], proof.Verdict] = {}
        self._backward: set[Case] = set()  # cases of which some benchmark times the backward

    def check(self, benchmark: Benchmark) -> proof.Verdict:
        case = benchmark.case
        key = case, benchmark.backward or case in self._backward
        if key not in self._verdicts:
            self._verdicts[key] = proof.prove(
                case, self.options.backend, backward=key[1], device=self.options.device
            )
        return self._verdicts[key]

    def run(self, benchmark: Benchmark) -> Result:
        result = new_result(benchmark)
        try:
            verdict = self.check(benchmark)
            result.backend = verdict.backend
            result.failure = verdict.problem or verdict.refusal
            if result.failure:
                return result
            result.checked = "error law passed"
            self._time(benchmark, result)
        except Exception as error:
            result.failure = f"{type(error).__name__}: {error}"
        return result

    def _time(self, benchmark: Benchmark, result: Result) -> None:
        settings = self.options
        field = contenders.make(benchmark, settings.backend, settings.flex, settings.device)
        result.absent = field.absent
        # Small calls are all host: by the CPU's clock, also where the GPU has its own.
        sample = None if benchmark.direction.startswith("call") else self._sample
        guests = frozenset() if benchmark.gpu else contenders.GUESTS
        samples = timing.interleave(field.calls, settings.budget_s, guests, sample)
        ours = samples[contenders.OURS]
        for name, seconds in samples.items():
            result.times[name] = timing.Timing.of(seconds).to_json()
            if name != contenders.OURS:
                result.ratios[name] = timing.ratio(seconds, ours).to_json()
        rate(benchmark, result)

    def run_all(self, benchmarks: list[Benchmark]) -> Iterator[Result]:
        """Results in order; those on the default allocator come from a child process, last."""
        self._backward = {b.case for b in benchmarks if b.backward}
        here = [b for b in benchmarks if not b.default_allocator]
        apart = [b for b in benchmarks if b.default_allocator]
        for benchmark in here:
            yield self.run(benchmark)
        if apart:
            yield from self._run_apart(apart)

    def _run_apart(self, benchmarks: list[Benchmark]) -> Iterator[Result]:
        request = {"options": asdict(self.options), "ids": [b.id for b in benchmarks]}
        waiting = list(benchmarks)
        try:
            for answer in child.answers("fastattn.bench.runner", request, default_environment()):
                waiting.pop(0)
                yield Result(**answer)
        except child.ChildError as error:
            for benchmark in waiting:
                result = new_result(benchmark)
                result.failure = str(error)
                yield result


def new_result(benchmark: Benchmark) -> Result:
    case = benchmark.case
    shape = case.shape if isinstance(case, AttentionCase) else dict(enumerate_shape(case))
    return Result(
        id=benchmark.id,
        op=case.op,
        kind=benchmark.kind,
        direction=benchmark.direction,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=shape,
        goal=benchmark.goal,
        roof_goal=benchmark.roof_goal,
        device="cuda" if benchmark.gpu else "cpu",
        against=benchmark.rival,
    )


def enumerate_shape(case: Case) -> Iterator[tuple[str, int]]:
    """Rows and width of a row-wise case."""
    sizes: tuple[int, ...] = case.shape  # type: ignore[attr-defined]
    yield "rows", int(torch.Size(sizes[:-1]).numel())
    yield "width", sizes[-1]


def rate(benchmark: Benchmark, result: Result) -> None:
    """Work a second that ours achieved."""
    work = benchmark.case.work(backward=benchmark.direction == "backward")
    flops, moved = work.flops, work.bytes
    if benchmark.direction == "call_backward":
        backward = benchmark.case.work(backward=True)
        flops, moved = flops + backward.flops, moved + backward.bytes
    seconds = result.times[contenders.OURS]["median"]
    result.gflops, result.gbytes = 1e-9 * flops / seconds, 1e-9 * moved / seconds
    result.intensity = flops / moved


def main() -> None:
    request = json.load(sys.stdin)
    options = Options(**request["options"])
    torch.set_num_threads(options.threads)
    runner = Runner(options)
    by_id: dict[str, Benchmark] = {b.id: b for b in BENCHMARKS}
    for name in request["ids"]:
        print(json.dumps(asdict(runner.run(by_id[name]))), flush=True)


if __name__ == "__main__":
    main()
