"""The README's table and picture, out of a report: python -m fastattn.bench.readme REPORT.json"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from . import plots, report
from .results import Report, Result

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PICTURE = Path("docs", "images", "speed.svg")
DTYPES = ("float32", "bfloat16", "float16")
SHADES = {"float32": "#2563eb", "bfloat16": "#ea580c", "float16": "#16a34a"}

# (op, kind, direction) -> what a reader calls it; kinds of the benchmark table, in its order.
ROWS = {
    ("attention", "full", "forward"): "attention forward",
    ("attention", "causal", "forward"): "attention forward, causal",
    ("attention", "full", "backward"): "attention backward",
    ("attention", "causal", "backward"): "attention backward, causal",
    ("attention", "bias", "forward"): "attention forward, with a bias",
    ("attention", "dropout", "forward"): "attention forward, with dropout",
    ("attention", "decode_mha", "forward"): "decode, 32 heads",
    ("attention", "decode_gqa", "forward"): "decode, 32 query heads on 8",
    ("layer_norm", "layer_norm", "forward"): "layer norm forward",
    ("layer_norm", "layer_norm", "backward"): "layer norm backward",
    ("softmax", "softmax", "forward"): "softmax forward",
    ("softmax", "softmax", "backward"): "softmax backward",
}

# op of a whole model -> rival -> what a reader calls it.
RIVALS = {
    "transformer": {"naive": "naive"},
    "gpt2": {"torch": "transformers' sdpa", "naive": "transformers' eager"},
}


def ratios(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    """(row, dtype) -> the ratio to torch's operator at each shape."""
    found: dict[tuple[str, str], list[float]] = {}
    for result in results:
        row = ROWS.get((result.op, result.kind, result.direction))
        if row and "torch" in result.ratios:
            found.setdefault((row, result.dtype), []).append(result.ratios["torch"]["median"])
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown: a row an operation, a column a dtype, the least and the most over the shapes."""
    found = ratios(results)

    def cell(values: list[float]) -> str:
        if not values:
            return ""
        low, high = f"{min(values):.1f}", f"{max(values):.1f}"
        return f"{low}x" if low == high else f"{low} to {high}x"

    lines = ["| | " + " | ".join(DTYPES) + " |", "|---" * (1 + len(DTYPES)) + "|"]
    for name in ROWS.values():
        if any((name, dtype) in found for dtype in DTYPES):
            cells = (cell(found.get((name, dtype), [])) for dtype in DTYPES)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for result in results:
        if result.op in RIVALS and result.ratio is not None:
            against = RIVALS[result.op][result.rival or ""]
            lines.append(f"| {result.id}, against {against} | {cell([result.ratio])} | | |")
    return "\n".join(lines)


def picture(results: Sequence[Result]) -> str:
    """SVG: a bar an operation and dtype, at the median over the shapes, with their range."""
    found = ratios(results)
    names = [name for name in ROWS.values() if any((name, dtype) in found for dtype in DTYPES)]
    sink: list[str] = []
    with plots.figure(8.0, 0.9 + 0.5 * len(names), sink) as axes:
        for place, name in enumerate(reversed(names)):
            for step, dtype in enumerate(DTYPES):
                values = found.get((name, dtype))
                if not values:
                    continue
                y, ratio = place + 0.25 * (1 - step), statistics.median(values)
                axes.barh(y, ratio, 0.23, color=SHADES[dtype])
                axes.plot([min(values), max(values)], [y, y], color="#111827", linewidth=0.8)
                axes.text(max(values), y, f" {ratio:.1f}x", va="center", fontsize=7)
        axes.axvline(1.0, color="#94a3b8", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_xlim(left=0)
        axes.set_xlabel("times faster than torch's own operator; line: range over the shapes")
        for dtype in DTYPES:
            axes.barh(0, 0, color=SHADES[dtype], label=dtype)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return sink[0]


def section(outcome: Report) -> str:
    """What stands between the marks of the README."""
    machine = outcome.machine
    return "\n\n".join(
        (
            "How many times faster than torch's own fused operator "
            "(`F.scaled_dot_product_attention`, `F.layer_norm`, `F.softmax`), the least and the "
            "most over the shapes:",
            table(outcome.results),
            f"![speed-up over torch's operators]({PICTURE.as_posix()})",
            f"Measured side by side in one run of `fastattn bench --{outcome.preset}` on "
            f"{machine['cpu']} ({machine['threads']} threads) with torch {machine['torch']}, "
            f"{outcome.started.partition(' ')[0]}; {report.summary(outcome)}. "
            "[How it is measured](docs/benchmarks.md).",
        )
    )


def update(readme: Path, outcome: Report) -> None:
    """Replaces the figures of the README and writes the picture beside it."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: expected the marks {BEGIN} and {END}")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    drawing = readme.parent / PICTURE
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_text(picture(outcome.results), encoding="utf-8")
    readme.write_text(f"{before}{BEGIN}\n{section(outcome)}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.readme")
    parser.add_argument("report", type=Path, help="JSON of `fastattn bench --json`")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(arguments)
    try:
        update(options.readme, Report.load(options.report))
    except (ImportError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
