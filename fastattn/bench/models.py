"""Every whole model that is benchmarked: check it, time it, measure its peak memory.

As a program (`python -m fastattn.bench.models`, a request as JSON on stdin) it measures peaks, in
a process forked for each contender, and prints a line of JSON for each.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from typing import Any

import torch
from torch import Tensor

from .. import child, testing
from . import gpt2, memory, table, tasks, timing, transformer
from .contenders import NAIVE, OURS
from .results import Result
from .whole_model import ModelBenchmark

BENCHMARKS: tuple[ModelBenchmark, ...] = (
    *transformer.BENCHMARKS,
    *tasks.BENCHMARKS,
    *gpt2.BENCHMARKS,
)
SHORT = 16  # tokens of a step that makes the optimizer's state before memory is measured


def choose(
    full: bool = False, op: str | None = None, dtype: str | None = None, pattern: str | None = None
) -> list[ModelBenchmark]:
    """As ``table.choose``."""
    return [
        b
        for b in BENCHMARKS
        if op in (None, b.op)
        and dtype in (None, b.dtype)
        and (table.matches(pattern, b.id) if pattern else full or b.quick)
    ]


def check(benchmark: ModelBenchmark, models: dict[str, Any], tokens: Tensor) -> None:
    """Hold our logits to the error law: AssertionError if they are wrong."""
    prompt = tokens[:1, :512]
    with torch.no_grad():
        ours, naive = (benchmark.logits(models[name], prompt) for name in (OURS, NAIVE))
        exact = benchmark.logits(copy.deepcopy(models[NAIVE]).double(), prompt)
    testing.assert_error_law("logits", ours, naive, exact)


def run(benchmark: ModelBenchmark, budget_s: float) -> Result:
    """Times of every contender, once ours is known to be right, and their peaks."""
    result = Result(
        id=benchmark.id,
        op=benchmark.op,
        kind=benchmark.direction,
        direction=benchmark.direction,
        dtype=benchmark.dtype,
        shape=benchmark.shape,
        goal=benchmark.goal,
    )
    reason = benchmark.unavailable()
    if reason:
        result.absent = dict.fromkeys(benchmark.contenders, reason)
        return result
    try:
        _time(benchmark, budget_s, result)
        gc.collect()
        _measure_peaks(benchmark, result)
    except Exception as error:
        result.failure = f"{type(error).__name__}: {error}"
    return result


def _time(benchmark: ModelBenchmark, budget_s: float, result: Result) -> None:
    models = benchmark.models()
    tokens = benchmark.make_tokens()
    check(benchmark, models, tokens)
    result.checked = "error law passed"
    calls = {name: benchmark.call(model, tokens) for name, model in models.items()}
    for call in calls.values():  # once more than the timer: the second finds all memory there
        call()
    samples = timing.interleave(calls, budget_s)
    for name, seconds in samples.items():
        result.times[name] = timing.Timing.of(seconds).to_json()
        if name != OURS:
            result.ratios[name] = timing.ratio(seconds, samples[OURS]).to_json()
    # Faster than one's neighbour is not enough: the goal is against the fastest of them.
    result.against = min(result.ratios, key=lambda name: result.ratios[name]["median"])
    result.tokens = benchmark.tokens / result.times[OURS]["median"]


# ------------------------------------------------------------------------------------ peak memory


def _measure_peaks(benchmark: ModelBenchmark, result: Result) -> None:
    if not memory.measurable():
        return
    request = {"id": benchmark.id, "threads": torch.get_num_threads()}
    # A model frees and takes hundreds of tensors: what glibc keeps of them between two calls would
    # decide the peak (150 to 300 MB of one and the same 136). Large ones go back at once instead.
    environment = memory.default_environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for answer in child.answers("fastattn.bench.models", request, environment):
        if "absent" in answer:
            raise RuntimeError(f"peak memory of {answer['contender']}: {answer['absent']}")
        result.peaks_mb[answer["contender"]] = answer["peak_mb"]


def peak_mb(benchmark: ModelBenchmark, contender: str) -> float:
    """MB of one call beyond the weights and, in training, the optimizer's state."""
    model, tokens = benchmark.model(contender), benchmark.make_tokens()
    if benchmark.new_tokens:
        call = benchmark.call(model, tokens)
        with torch.no_grad():
            benchmark.logits(model, tokens[:, :SHORT])
    else:
        step = benchmark.stepper(model)
        step(tokens[:, :SHORT])()
        model.zero_grad()
        call = step(tokens)
    return memory.high_water_mb(call)


def main() -> None:
    request = json.load(sys.stdin)
    benchmark = next(b for b in BENCHMARKS if b.id == request["id"])
    benchmark.unavailable()  # imports what all the forks need

    def work(job: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request["threads"])
        return job | {"peak_mb": peak_mb(benchmark, job["contender"])}

    memory.fork_each(({"contender": name} for name in benchmark.contenders), work)


if __name__ == "__main__":
    main()
