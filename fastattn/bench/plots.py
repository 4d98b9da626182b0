"""The pictures of the HTML report, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .report import section, short_name
from .results import Report, Result

COLOURS = {
    "ours": "#2563eb",
    "torch": "#ea580c",
    "naive": "#64748b",
    "flex": "#9333ea",
    "cudnn": "#16a34a",
    "flash": "#ca8a04",
    "efficient": "#64748b",
    "fa3": "#db2777",
    "compile": "#0891b2",
    "liger": "#9333ea",
}
LABELS = {
    "ours": "fastattn",
    "torch": "torch's operator",
    "naive": "naive",
    "flex": "FlexAttention",
    "cudnn": "cuDNN",
    "flash": "torch, flash",
    "efficient": "torch, efficient",
    "fa3": "FlashAttention 3",
    "compile": "torch.compile",
    "liger": "Liger",
}
GOAL = "#111827"


def require_matplotlib() -> None:
    """ImportError with the command that helps."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        from ..console import EXTRAS

        raise ImportError(f"the HTML report needs matplotlib: {EXTRAS}") from None


@contextmanager
def figure(width: float, height: float, sink: list[str]) -> Iterator[Any]:
    """Axes to draw on; their SVG is appended to `sink`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(drawing)
        axes = drawing.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
    sink.append(svg[svg.index("<svg") :])


def speed_ups(results: list[Result]) -> str:
    """A bar a case: torch's time over ours, its range, and a mark at its goal."""
    shown = [r for r in results if r.ratio is not None]
    sink: list[str] = []
    with figure(9.0, 0.9 + 0.24 * len(shown), sink) as axes:
        for place, result in enumerate(reversed(shown)):
            rival = result.rival or ""
            spread, ratio = result.ratios[rival], result.ratio or 0.0
            axes.barh(place, ratio, 0.62, color="#93c5fd" if rival == "naive" else COLOURS["ours"])
            axes.plot([spread["low"], spread["high"]], [place] * 2, color="#94a3b8", linewidth=1)
            end = max(ratio, spread["high"], result.goal or 0.0)
            name = "" if result.device == "cpu" else f" {LABELS[rival]}"
            axes.text(end, place, f"  {ratio:.2f}x{name}", va="center")
            if result.goal is not None:
                axes.plot([result.goal] * 2, [place - 0.4, place + 0.4], color=GOAL, linewidth=2)
        axes.axvline(1.0, color="#94a3b8", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(shown)), [short_name(r) for r in reversed(shown)])
        axes.set_xlim(left=0)
        axes.set_ylim(-0.7, len(shown) - 0.3)
        rivals = "torch's operator (light: than naive code, where torch has none)"
        if any(r.device != "cpu" for r in shown):
            rivals = "the one named beside it, the fastest of the others"
        axes.set_xlabel(f"times faster than {rivals}; black mark: the goal")
    return sink[0]


def roofline(report: Report) -> str:
    """Achieved GFLOP/s against operations a byte, under the measured roofs."""
    roofs = report.ceilings
    sink: list[str] = []
    with figure(9.0, 4.6, sink) as axes:
        shown = [r for r in report.results if r.intensity and r.gflops]
        intensities = [r.intensity for r in shown] or [1.0]
        low, high = min(intensities) / 3, max(intensities) * 3
        top = max(roofs["arithmetic"].values())
        bend = top / roofs["copy"]
        corners = sorted([low, bend, high])
        axes.plot(corners, [min(x * roofs["copy"], top) for x in corners], color=GOAL)
        for name, rate in roofs["arithmetic"].items():
            if rate < top and rate * 5 > top:
                axes.axhline(rate, color="#94a3b8", linewidth=0.8)
                axes.text(high, rate, name, ha="right", va="bottom", color="#64748b")
        axes.text(high, top, f"fastest arithmetic {top:.0f} GFLOP/s", ha="right", va="bottom")
        shapes = {"float32": "o", "bfloat16": "s", "float16": "^"}
        palette = {"attention": "#2563eb", "layer_norm": "#16a34a", "softmax": "#db2777"}
        seen = set()
        for r in shown:
            label = f"{r.op} {r.dtype}"
            axes.plot(
                r.intensity,
                r.gflops,
                shapes.get(r.dtype, "o"),
                color=palette.get(r.op, "#64748b"),
                alpha=0.75,
                label=None if label in seen else label,
            )
            seen.add(label)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
        if seen:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.grid(alpha=0.2)
    return sink[0]


def _against_length(title: str, unit: str, lines: dict[str, dict[int, float]]) -> str:
    sink: list[str] = []
    with figure(5.6, 3.4, sink) as axes:
        for name, points in lines.items():
            lengths = sorted(points)
            heights = [points[s] for s in lengths]
            axes.plot(lengths, heights, "o-", color=COLOURS[name], label=LABELS[name], markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel=unit, title=title)
        ticks = sorted({s for points in lines.values() for s in points})
        axes.set_xticks(ticks, [str(s) for s in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
    return sink[0]


def time_against_length(results: list[Result]) -> list[str]:
    """A picture for each kind of attention that was timed at two lengths or more."""
    families: dict[tuple[str, str, str, int], list[Result]] = {}
    for r in results:
        if r.op == "attention" and r.kind in ("full", "causal") and r.times:
            families.setdefault((r.direction, r.kind, r.dtype, r.shape["D"]), []).append(r)
    pictures = []
    for (direction, kind, dtype, head_dim), members in families.items():
        if len({r.shape["M"] for r in members}) < 2:
            continue
        lines: dict[str, dict[int, float]] = {}
        for r in members:
            for name, timing in r.times.items():
                lines.setdefault(name, {})[r.shape["M"]] = 1e3 * timing["median"]
        title = f"{direction}, {kind}, {dtype}, D {head_dim}"
        pictures.append(_against_length(title, "ms", lines))
    return pictures


def rate_against_width(report: Report) -> list[str]:
    """GB/s of layer norm and softmax under the copy ceiling, where three widths were timed."""
    families: dict[tuple[str, str, str], list[Result]] = {}
    for r in report.results:
        if "width" in r.shape and r.gbytes and not r.kind.endswith("_fresh"):
            families.setdefault((r.kind, r.direction, r.dtype), []).append(r)
    pictures = []
    for (kind, direction, dtype), members in families.items():
        if len({r.shape["width"] for r in members}) < 3:
            continue
        lines: dict[str, dict[int, float]] = {}
        for r in members:
            for name, timing in r.times.items():
                rate = r.gbytes * r.times["ours"]["median"] / timing["median"]
                lines.setdefault(name, {})[r.shape["width"]] = rate
        title = f"{kind} {direction}, {dtype}"
        pictures.append(_against_width(title, lines, report.ceilings["copy"]))
    return pictures


def _against_width(title: str, lines: dict[str, dict[int, float]], copy: float) -> str:
    sink: list[str] = []
    with figure(5.6, 3.4, sink) as axes:
        for name, points in lines.items():
            widths = sorted(points)
            rates = [points[w] for w in widths]
            axes.plot(widths, rates, "o-", color=COLOURS[name], label=LABELS[name], markersize=4)
        axes.axhline(copy, color=GOAL, linewidth=0.8, linestyle="--", label="copy")
        axes.set(xscale="log", xlabel="width of a row", ylabel="GB/s", title=title)
        ticks = sorted({w for points in lines.values() for w in points})
        axes.set_xticks(ticks, [str(w) for w in ticks])
        axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    return sink[0]


def memory_against_length(report: Report) -> list[str]:
    pictures = []
    for backward in (False, True):
        lines: dict[str, dict[int, float]] = {}
        for peak in report.memory:
            if peak.backward == backward and peak.extra_mb is not None:
                # A logarithmic axis has no zero: a page's worth stands for none.
                lines.setdefault(peak.contender, {})[peak.length] = max(peak.extra_mb, 0.1)
        if lines:
            title = "forward + backward" if backward else "forward"
            pictures.append(_against_length(title, "MB beyond inputs and outputs", lines))
    return pictures


def every(report: Report) -> list[tuple[str, list[str]]]:
    """Headings and their pictures."""
    groups: dict[str, list[Result]] = {}
    for result in report.results:
        if result.ratio is not None:
            groups.setdefault(section(result), []).append(result)
    pages = [(title, [speed_ups(members)]) for title, members in groups.items()]
    more: list[tuple[str, Callable[[], list[str]]]] = [
        ("Roofline", lambda: [roofline(report)]),
        ("Time against sequence length", lambda: time_against_length(report.results)),
        ("Rate against the width of a row", lambda: rate_against_width(report)),
        ("Memory against sequence length", lambda: memory_against_length(report)),
    ]
    for title, draw in more:
        pictures = draw()
        if pictures:
            pages.append((title, pictures))
    return pages
