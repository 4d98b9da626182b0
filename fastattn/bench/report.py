"""The terminal's view of a report."""

from __future__ import annotations

from typing import Any

from ..console import BAD, BOLD, DIM, GOOD, Cell, Console
from .results import Peak, Report, Result

SECTIONS = (
    ("attention", "forward", "Attention, forward"),
    ("attention", "backward", "Attention, backward alone"),
    ("attention", "call", "Attention, small call with autograd on"),
    ("layer_norm", "forward", "Layer norm, forward"),
    ("layer_norm", "backward", "Layer norm, backward alone"),
    ("softmax", "forward", "Softmax, forward"),
    ("softmax", "backward", "Softmax, backward alone"),
    ("transformer", "", "Transformer, fused against naive"),
)
CONTENDERS = ("ours", "torch", "naive", "flex")  # on a CPU
PEERS = ("ours", "cudnn", "flash", "efficient", "fa3", "flex", "torch", "compile", "liger")  # a GPU
LEGEND = (
    "ratio: torch's time over ours (naive's where torch has no such operator); range: its least "
    "and most over the rounds; roof: share of this machine's multiply-add or copy ceiling; "
    "flex: with --flex or --full"
)
GPU_LEGEND = (
    "ratio: the time of the fastest of the others over ours (layer norm backward: torch's); range: "
    "its least and most over the rounds; roof: share of the measured GEMM or copy ceiling, and the "
    "share that is the goal; times are the device's alone, but for small calls, where they are the "
    "host's"
)


def contenders_of(results: list[Result]) -> tuple[str, ...]:
    """Who has a column in a table of these results."""
    if all(result.device == "cpu" for result in results):
        return CONTENDERS
    named = {name for result in results for name in (*result.times, *result.absent)}
    return tuple(name for name in PEERS if name in named)


def columns(contenders: tuple[str, ...] = CONTENDERS) -> tuple[str, ...]:
    return ("case", *contenders, "ratio", "range", "goal", "", "rate", "roof")


def milliseconds(seconds: float) -> str:
    """Three digits: 0.0123, 1.23, 123 ms."""
    value = 1e3 * seconds
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 if value >= 1 else 3 if value >= 0.1 else 4}f}"


def section(result: Result) -> str:
    for op, direction, title in SECTIONS:
        if result.op == op and result.direction.startswith(direction):
            return title
    return result.op


def short_name(result: Result) -> str:
    """The id without what the section's title says."""
    name = result.id.removeprefix(result.op + "-").removesuffix("-" + result.direction)
    distinct = result.direction in ("forward", "backward")  # the title says these
    return name if distinct else f"{name} {result.direction}"


def speed(gflops: float) -> str:
    return f"{gflops / 1e3:.0f} TFLOP/s" if gflops >= 1e4 else f"{gflops:.0f} GFLOP/s"


def row(result: Result, contenders: tuple[str, ...] = CONTENDERS) -> list[Cell]:
    cells: list[Cell] = [short_name(result)]
    if result.failure:
        return [*cells, ("failed", BAD), *[""] * (len(contenders) + 5)]
    for contender in contenders:
        timing = result.times.get(contender)
        missing = "absent" if contender in result.absent else ""
        cells.append(milliseconds(timing["median"]) if timing else (missing, DIM))
    spread = result.ratios.get(result.rival or "")
    ratio = result.ratio
    verdict: Cell = ""
    style = BOLD
    if result.reached is not None:
        style = GOOD if result.reached else BAD
        verdict = ("ok" if result.reached else "below", style)
    rates = {
        "compute": speed(result.gflops),
        "memory": f"{result.gbytes:.1f} GB/s",
        "": f"{result.tokens:.0f} token/s",
    }
    return [
        *cells,
        "" if ratio is None else (f"{ratio:.2f}x", style),
        (f"{spread['low']:.2f}-{spread['high']:.2f}" if spread else "", DIM),
        "" if result.goal is None else f"{result.goal:g}x",
        verdict,
        rates[result.bound],
        f"{result.of_ceiling:.0%}{roof_goal(result)}" if result.bound else "",
    ]


def roof_goal(result: Result) -> str:
    return "" if result.roof_goal is None else f" of {result.roof_goal:.0%}"


def grouped(results: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(section(result), []).append(result)
    return groups


def summary(report: Report) -> str:
    with_goal = [r for r in report.results if r.reached is not None]
    failed = sum(bool(r.failure) for r in report.results)
    text = f"{sum(bool(r.reached) for r in with_goal)} of {len(with_goal)} goals reached"
    return text + (f", {failed} cases failed" if failed else "")


def memory_rows(peaks: list[Peak]) -> list[list[Cell]]:
    """A row a length and direction, a column a contender: MB beyond inputs and outputs."""
    keys = sorted({(p.backward, p.length) for p in peaks})
    rows: list[list[Cell]] = []
    for backward, length in keys:
        cells: list[Cell] = [f"S {length} {'forward + backward' if backward else 'forward'}"]
        for contender in ("ours", "torch", "naive"):
            found = [
                p
                for p in peaks
                if (p.backward, p.length, p.contender) == (backward, length, contender)
            ]
            if not found:
                cells.append("")
            elif found[0].extra_mb is None:
                cells.append((found[0].absent, DIM))
            else:
                cells.append(f"{found[0].extra_mb:.1f}")
        rows.append(cells)
    return rows


def head(report: Report) -> list[str]:
    machine, roofs = report.machine, report.ceilings
    on_gpu = machine.get("device", "cpu") != "cpu"
    rates = ", ".join(f"{name} {speed(rate)}" for name, rate in roofs["arithmetic"].items())
    arithmetic = "GEMM" if on_gpu else "multiply-adds"
    flags = " ".join(machine["flags"])
    allocator = "allocator: as it is"
    if report.allocator.get("reuse_memory"):
        allocator = "allocator: memory is reused, without page faults, on both sides; the "
        allocator += "fresh_64mb cases run as users do"
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {flags}",
        f"fastattn {machine['fastattn']} ({machine['commit'] or 'no checkout'}), "
        f"torch {machine['torch']}, Python {machine['python']}",
        *([gpu_facts(machine)] if on_gpu else []),
        f"ceilings: {arithmetic} {rates}; copy {roofs['copy']:.1f} GB/s",
        *([] if on_gpu else [allocator]),
    ]


def gpu_facts(machine: dict[str, Any]) -> str:
    return (
        f"{machine['gpu']}, compute capability {machine['gpu_capability']}, "
        f"{machine['gpu_multiprocessors']} multiprocessors, {machine['gpu_memory_gb']:.0f} GB; "
        f"CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, triton {machine['triton']}, "
        f"liger {machine['liger'] or 'not installed'}"
    )


def legend(report: Report) -> str:
    return LEGEND if report.machine.get("device", "cpu") == "cpu" else GPU_LEGEND


def host_rows(report: Report) -> list[list[Cell]]:
    return [[name, f"{cost:.0f}"] for name, cost in report.host_us.items()]


HOST_TITLE = "Host, a call of the Triton backend  [us]"


def show(console: Console, report: Report) -> None:
    for line in head(report):
        console.line(line, DIM)
    for title, results in grouped(report.results).items():
        names = contenders_of(results)
        console.table(f"{title}  [ms]", columns(names), (row(r, names) for r in results))
    if report.host_us:
        console.table(HOST_TITLE, ("", "us"), host_rows(report))
    if report.memory:
        console.table(
            "Attention, memory beyond inputs and outputs, causal float32 B1 H8 D64  [MB]",
            ("", "ours", "torch", "naive"),
            memory_rows(report.memory),
        )
    for result in report.results:
        if result.failure:
            console.line(f"FAILED {result.id}: {result.failure}", BAD)
        for name, reason in result.absent.items():
            console.line(f"{result.id}: no {name}: {reason}", DIM)
    for note in report.notes:
        console.line(note, DIM)
    console.line(legend(report), DIM)
    console.line(f"{summary(report)}, in {report.seconds:.0f} s", BOLD)
