"""`fastattn bench`: choose, run, report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import backends
from ..console import BAD, DIM, EXTRAS, Console
from . import (
    allocator,
    ceilings,
    compare,
    gpu,
    gpu_table,
    html,
    machine,
    memory,
    models,
    overhead,
    plots,
    report,
    table,
)
from .results import Peak, Report, Result
from .runner import Options, Runner
from .table import Benchmark
from .whole_model import ModelBenchmark

QUICK_BUDGET_S, FULL_BUDGET_S = 0.35, 2.0
RESULTS = Path("benchmarks/results")  # where a GPU's figures go if nothing else is said


def bench(console: Console, options: argparse.Namespace) -> int:
    on_gpu = options.device == "cuda"
    if on_gpu and not options.list:
        options.json = options.json or RESULTS / "cuda.json"
        options.html = options.html or RESULTS / "cuda.html"
    try:  # what is wrong shows before the run, not after it
        if options.html:
            plots.require_matplotlib()
        if on_gpu and not options.list and (reason := gpu.unavailable()):
            raise ValueError(f"--device cuda: {reason}")
        if options.backend is not None:
            check_backend(options.backend)
        for path in filter(None, (options.json, options.html)):
            check_writable(path)
        old = Report.load(options.compare) if options.compare else None
    except (ImportError, ValueError) as error:
        console.line(f"fastattn bench: {error}", BAD)
        return 2
    if console.rich is None:
        console.line(f"plain tables and no progress bar; for more: {EXTRAS}")

    benchmarks = gpu_table.BENCHMARKS if on_gpu else table.BENCHMARKS
    filters = (options.full, options.op, options.dtype, options.case)
    kernels = table.choose(*filters, benchmarks)
    whole = [] if on_gpu else models.choose(*filters)
    if options.list:
        for kernel in kernels:
            console.line(kernel.id + goals(kernel))
        for model in whole:
            console.line(model.id + goals(model))
        return 0
    if not kernels and not whole:
        more = "fastattn bench --list" if options.full else "--full, and --list, for what there is"
        console.line(f"fastattn bench: no benchmark matches; see {more}", BAD)
        return 2

    outcome = run(console, options, kernels, whole)
    report.show(console, outcome)
    if old:
        compare.show(console, old, outcome)
    if options.json:
        outcome.save(options.json)
    if options.html:
        html.save(outcome, options.html)
    for path in (options.json, options.html):
        if path:
            console.line(f"wrote {path}", DIM)
    return 1 if any(result.failure for result in outcome.results) else 0


def goals(benchmark: Benchmark | ModelBenchmark) -> str:
    text = f"  goal {benchmark.goal:g}x" if benchmark.goal else ""
    roof = getattr(benchmark, "roof_goal", None)
    return text + (f"  goal {roof:.0%} of roof" if roof else "")


def check_backend(name: str) -> None:
    reasons = backends()
    if name not in reasons:
        raise ValueError(f"unknown backend {name!r}: {', '.join(reasons)}")
    if reasons[name] is not None:
        raise ValueError(f"backend {name!r} does not run here: {reasons[name]}")


def check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def run(
    console: Console,
    options: argparse.Namespace,
    kernels: list[Benchmark],
    whole: list[ModelBenchmark],
) -> Report:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        return run_on_gpu(console, options, kernels)
    started = time.monotonic()
    others = machine.Others()
    budget_s = FULL_BUDGET_S if options.full else QUICK_BUDGET_S
    # Memory is shown for whole runs only: a filter asks for something else.
    filtered = options.op not in (None, "attention") or options.dtype or options.case
    peaks = [] if filtered else memory.jobs(options.full)
    outcome = Report(preset="full" if options.full else "quick", machine=machine.describe())
    outcome.started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    outcome.allocator = allocator.describe(allocator.reuse_memory())

    total = 2 + len(kernels) + len(whole) + len(peaks)
    with console.progress(total, "bench") as advance:
        advance("ceilings of this machine")
        roofs = ceilings.measure()
        settings = Options(
            threads=torch.get_num_threads(),
            budget_s=budget_s,
            backend=options.backend,
            flex=options.flex or options.full,
        )
        runner = Runner(settings)
        for result in _results(runner, kernels, whole, budget_s):
            outcome.results.append(result)
            advance(result.id)
        for peak in _peaks(peaks, settings):
            outcome.memory.append(peak)
            advance(f"memory of {peak.contender} at S {peak.length}")
        # Once more, at the other end of the run: a roof must not come from a disturbed moment.
        roofs = roofs.or_better(ceilings.measure())
        advance("ceilings of this machine")
    finish(outcome, roofs, others, started)
    return outcome


def run_on_gpu(console: Console, options: argparse.Namespace, kernels: list[Benchmark]) -> Report:
    """By the device's own clock, under its own ceilings."""
    started, others = time.monotonic(), machine.Others()
    device = gpu.device()
    outcome = Report(preset="full" if options.full else "quick", machine=machine.describe())
    outcome.machine |= {"device": "cuda", **gpu.describe(device)}
    outcome.started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with console.progress(2 + len(kernels), "bench") as advance:
        advance("ceilings of this device")
        stopwatch = gpu.Stopwatch(device)
        roofs = gpu.measure_ceilings(stopwatch)
        outcome.host_us = overhead.launch_microseconds(device, options.backend)
        settings = Options(
            threads=torch.get_num_threads(),
            budget_s=FULL_BUDGET_S if options.full else QUICK_BUDGET_S,
            backend=options.backend,
            flex=True,
            device=str(device),
        )
        for result in Runner(settings, stopwatch.sample).run_all(kernels):
            outcome.results.append(result)
            advance(result.id)
        roofs = roofs.or_better(gpu.measure_ceilings(stopwatch))
        advance("ceilings of this device")
    finish(outcome, roofs, others, started)
    return outcome


def finish(
    outcome: Report, roofs: ceilings.Ceilings, others: machine.Others, started: float
) -> None:
    outcome.ceilings = roofs.to_json()
    for result in outcome.results:
        roofs.hold_against(result)
    outcome.machine["others"] = others.share()
    outcome.seconds = time.monotonic() - started
    outcome.notes = notes(outcome)


def _results(
    runner: Runner, kernels: list[Benchmark], whole: list[ModelBenchmark], budget_s: float
) -> Iterator[Result]:
    yield from runner.run_all(kernels)
    for model in whole:
        yield models.run(model, budget_s)


def _peaks(planned: list[Peak], settings: Options) -> Iterator[Peak]:
    if planned:
        yield from memory.measure(planned, settings.threads, settings.backend)


def notes(outcome: Report) -> list[str]:
    """What a reader must know to trust the figures."""
    lines = []
    others = outcome.machine["others"]
    if others is not None and others > 0.05:
        lines.append(f"other processes took {others:.0%} of this machine: do not trust these times")
    served = sorted({r.backend for r in outcome.results if r.backend})
    if served:
        lines.append(f"backend that served: {', '.join(served)}")
    if served == ["reference"]:
        lines.append("only the reference backend runs here, so nothing is expected to be faster")
    longest = max((p.length for p in outcome.memory), default=0)
    for peak in outcome.memory:
        ours = peak.contender == "ours" and peak.length == longest and not peak.backward
        if ours and peak.extra_mb is not None:
            limit = "under" if peak.extra_mb < 64 else "NOT under"
            lines.append(
                f"memory beyond inputs and outputs at S {longest}: {peak.extra_mb:.1f} MB, "
                f"{limit} the limit of 64 MB"
            )
    return lines
