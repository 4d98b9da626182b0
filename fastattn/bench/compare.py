"""What moved between two reports."""

from __future__ import annotations

from ..console import BAD, DIM, GOOD, Cell, Console
from .report import milliseconds
from .results import Report, Result

NOISE = 0.05  # changes smaller than this are not called moves
COLUMNS = ("case", "old", "new", "time", "old ratio", "new ratio", "ratio", "")


def verdict(old: Result, new: Result) -> str:
    """Judge the ratio, as both of its sides shared a machine and a moment.

    The answer is "faster", "slower" or "". It moved if the medians differ by
    more than NOISE and neither lies in the other's range.
    """
    before, after = _spread(old), _spread(new)
    if before is None or after is None:
        return ""
    if abs(after["median"] / before["median"] - 1.0) < NOISE:
        return ""
    if _within(before["median"], after) or _within(after["median"], before):
        return ""
    return "faster" if after["median"] > before["median"] else "slower"


def _spread(result: Result) -> dict[str, float] | None:
    return result.ratios.get("torch") or result.ratios.get("naive")


def _within(value: float, spread: dict[str, float]) -> bool:
    return spread["low"] <= value <= spread["high"]


def changes(old: Report, new: Report) -> list[tuple[Result, Result, str]]:
    """Results of both reports by id, those that moved first."""
    before = {result.id: result for result in old.results if result.times}
    both = [(before[r.id], r) for r in new.results if r.times and r.id in before]
    judged = [(a, b, verdict(a, b)) for a, b in both]
    return sorted(judged, key=lambda change: change[2] == "")


def differences(old: Report, new: Report) -> list[str]:
    """In what the two runs were not alike."""
    names = ("cpu", "cores", "threads", "torch", "python", "fastattn", "commit")
    return [
        f"{name}: {old.machine.get(name)} -> {new.machine.get(name)}"
        for name in names
        if old.machine.get(name) != new.machine.get(name)
    ]


def show(console: Console, old: Report, new: Report) -> None:
    judged = changes(old, new)
    for line in differences(old, new):
        console.line(line, DIM)
    rows: list[list[Cell]] = []
    for before, after, moved in judged:
        old_s, new_s = before.times["ours"]["median"], after.times["ours"]["median"]
        old_ratio, new_ratio = before.ratio, after.ratio
        style = {"faster": GOOD, "slower": BAD}.get(moved, DIM)
        ratios = ["", "", ""]
        if old_ratio and new_ratio:
            ratios = [f"{old_ratio:.2f}x", f"{new_ratio:.2f}x", f"{new_ratio / old_ratio - 1:+.0%}"]
        rows.append(
            [
                after.id,
                milliseconds(old_s),
                milliseconds(new_s),
                f"{new_s / old_s - 1:+.0%}",
                *ratios,
                (moved, style),
            ]
        )
    console.table("Compared: ours in ms, and torch's time over ours", COLUMNS, rows)
    count = {word: sum(moved == word for *_, moved in judged) for word in ("faster", "slower")}
    missing = len(new.results) - len(judged)
    console.line(
        f"{count['faster']} faster, {count['slower']} slower, "
        f"{len(judged) - sum(count.values())} unmoved"
        + (f", {missing} without a counterpart" if missing else "")
    )
