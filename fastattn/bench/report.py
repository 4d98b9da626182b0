"""The terminal's view of a report."""

from __future__ import annotations

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
COLUMNS = ("case", "ours", "torch", "naive", "flex", "ratio", "range", "goal", "", "rate", "roof")
LEGEND = (
    "ratio: torch's time over ours (naive's where torch has no such operator); range: its least "
    "and most over the rounds; roof: share of this machine's multiply-add or copy ceiling; "
    "flex: with --flex or --full"
)


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


def row(result: Result) -> list[Cell]:
    cells: list[Cell] = [short_name(result)]
    if result.failure:
        return [*cells, ("failed", BAD), *[""] * 9]
    for contender in ("ours", "torch", "naive", "flex"):
        timing = result.times.get(contender)
        missing = "absent" if contender in result.absent else ""
        cells.append(milliseconds(timing["median"]) if timing else (missing, DIM))
    rival = "torch" if "torch" in result.ratios else "naive"
    spread = result.ratios.get(rival)
    ratio = result.ratio
    verdict: Cell = ""
    style = BOLD
    if result.reached is not None:
        style = GOOD if result.reached else BAD
        verdict = ("ok" if result.reached else "below", style)
    rates = {
        "compute": f"{result.gflops:.0f} GFLOP/s",
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
        f"{result.of_ceiling:.0%}" if result.bound else "",
    ]


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
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in roofs["arithmetic"].items())
    flags = " ".join(machine["flags"])
    reuse = report.allocator.get("reuse_memory")
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {flags}",
        f"fastattn {machine['fastattn']} ({machine['commit'] or 'no checkout'}), "
        f"torch {machine['torch']}, Python {machine['python']}",
        f"ceilings: multiply-adds {rates} GFLOP/s; copy {roofs['copy']:.1f} GB/s",
        "allocator: memory is reused, without page faults, on both sides; the fresh_64mb cases "
        "run as users do"
        if reuse
        else "allocator: as it is",
    ]


def show(console: Console, report: Report) -> None:
    for line in head(report):
        console.line(line, DIM)
    for title, results in grouped(report.results).items():
        console.table(f"{title}  [ms]", COLUMNS, map(row, results))
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
    console.line(LEGEND, DIM)
    console.line(f"{summary(report)}, in {report.seconds:.0f} s", BOLD)
