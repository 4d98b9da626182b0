"""The report as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..console import Cell
from . import plots
from .report import (
    HOST_TITLE,
    columns,
    contenders_of,
    grouped,
    head,
    host_rows,
    legend,
    memory_rows,
    row,
    summary,
)
from .results import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #111827; background: #fff; }
h1 { margin-bottom: 0.2rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #e5e7eb; }
p.head { margin: 0; color: #4b5563; } p.summary { font-size: 1.3rem; }
svg { max-width: 100%; height: auto; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
td, th { padding: 0.15rem 0.7rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
th { border-bottom: 1px solid #9ca3af; } tr:hover td { background: #f3f4f6; }
.green { color: #15803d; } .red { color: #b91c1c; } .dim { color: #6b7280; }
.bold { font-weight: 600; }
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(c)}</th>" for c in columns) + "</tr>"]
    for cells in rows:
        parts = []
        for cell in cells:
            text, style = (cell, "") if isinstance(cell, str) else cell
            parts.append(
                f'<td class="{style}">{escape(text)}</td>' if style else f"<td>{escape(text)}</td>"
            )
        lines.append("<tr>" + "".join(parts) + "</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def render(report: Report) -> str:
    parts = ["<h1>fastattn benchmark</h1>", f'<p class="head">{escape(report.started)}</p>']
    parts += [f'<p class="head">{escape(line)}</p>' for line in head(report)]
    parts.append(f'<p class="summary">{escape(summary(report))}</p>')
    for title, pictures in plots.every(report):
        parts.append(f"<h2>{escape(title)}</h2>")
        parts.append('<div class="pictures">' + "".join(pictures) + "</div>")
    parts.append("<h2>All figures</h2>")
    for title, results in grouped(report.results).items():
        parts.append(f"<h3>{escape(title)} [ms]</h3>")
        names = contenders_of(results)
        parts.append(table(columns(names), (row(r, names) for r in results)))
    if report.host_us:
        parts.append(f"<h3>{escape(HOST_TITLE)}</h3>")
        parts.append(table(("", "us"), host_rows(report)))
    if report.memory:
        parts.append("<h3>Attention, MB beyond inputs and outputs (causal float32 B1 H8 D64)</h3>")
        parts.append(table(("", "ours", "torch", "naive"), memory_rows(report.memory)))
    checked = "Every case was checked against float64 first."
    parts.append(f'<p class="dim">{escape(legend(report))}. {checked}</p>')
    failed = [f"{r.id}: {r.failure}" for r in report.results if r.failure]
    parts += [f'<p class="red">FAILED {escape(line)}</p>' for line in failed]
    absent = [(r.id, n, why) for r in report.results for n, why in r.absent.items()]
    parts += [f'<p class="dim">{escape(f"{i}: no {n}: {why}")}</p>' for i, n, why in absent]
    parts += [f'<p class="dim">{escape(note)}</p>' for note in report.notes]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastattn benchmark</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")
