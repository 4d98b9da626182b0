"""Terminal output: rich where it is installed, plain text where it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

EXTRAS = "pip install 'fastattn[bench]'"
GOOD, BAD, DIM, BOLD = "green", "red", "dim", "bold"

Cell = str | tuple[str, str]  # text, or text and its style


class Advance(Protocol):
    def __call__(self, label: str) -> None: ...


class Console:
    """Prints lines and tables, and runs a progress bar on stderr's terminal."""

    def __init__(self) -> None:
        try:
            from rich.console import Console as RichConsole
        except ImportError:
            self.rich: Any = None
        else:
            # A pipe or a file has no width of its own: a table must not be cut to 80 columns.
            width = None if sys.stdout.isatty() else 132
            self.rich = RichConsole(width=width, highlight=False)

    def line(self, text: str = "", style: str = "") -> None:
        if self.rich is None:
            print(text)
        else:
            self.rich.print(text, style=style or None, markup=False, soft_wrap=True)

    def pairs(self, title: str, rows: Sequence[tuple[str, Cell]]) -> None:
        """A heading and its facts, a line each."""
        width = max(len(name) for name, _ in rows)
        self.line(title, BOLD)
        for name, cell in rows:
            text, style = _split(cell)
            self.line(f"  {name.ljust(width)}  {text}", style)
        self.line()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """A table whose first column is left-aligned and whose others are right-aligned."""
        cells = [[_split(cell) for cell in row] for row in rows]
        if self.rich is None:
            _plain_table(title, columns, [[text for text, _ in row] for row in cells])
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in cells:
            table.add_row(*(Text(text, style=style) for text, style in row))
        self.rich.print(table)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Advance]:
        """A bar that the yielded function moves one step on, with what is being done now."""
        if self.rich is None or not self.rich.is_terminal:
            yield _plain_progress(total, what)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.description}"),
            console=self.rich,
            transient=True,
        )
        with bar:
            task = bar.add_task("", total=total)

            def advance(label: str) -> None:
                bar.update(task, advance=1, description=label)

            yield advance


def _split(cell: Cell) -> tuple[str, str]:
    return (cell, "") if isinstance(cell, str) else cell


def _plain_progress(total: int, what: str) -> Advance:
    """A line on stderr for every tenth of the work."""
    done = 0

    def advance(label: str) -> None:
        nonlocal done
        done += 1
        if done == total or done * 10 // total > (done - 1) * 10 // total:
            print(f"{what} {done}/{total}  {label}", file=sys.stderr, flush=True)

    return advance


def _plain_table(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for row in (list(columns), ["-" * width for width in widths], *rows):
        first, *rest = zip(row, widths, strict=True)
        line = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
        print("  ".join(line).rstrip())
