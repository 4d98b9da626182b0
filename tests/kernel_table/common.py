"""What the tables of generated code share: what a multiprocessor holds, and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

GROWTH = 1.05  # of registers, before it is a failure


class Machine(NamedTuple):
    """What a multiprocessor has."""

    registers: int
    threads: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of it that each block takes for itself


MACHINES = {
    "sm_80": Machine(65536, 2048, 32, 164 << 10, 1024),
    "sm_90": Machine(65536, 2048, 32, 228 << 10, 1024),
    "sm_100": Machine(65536, 2048, 32, 228 << 10, 1024),
    "sm_120": Machine(65536, 1536, 24, 100 << 10, 1024),
    "gfx942": Machine(4 * 64 * 512, 2048, 16, 64 << 10, 0),
}


def blocks_that_fit(machine: Machine, registers: int, threads: int, shared: int) -> int:
    """Of a kernel, on a multiprocessor. Registers are given out in eights a thread."""
    held = -(-max(registers, 1) // 8) * 8 * threads
    fits = (machine.registers // held, machine.threads // threads, machine.blocks)
    return min(*fits, machine.shared // max(shared + machine.reserved, 1))


def text_of(lines: Iterable[Any], title: str, fields: tuple[str, ...]) -> str:
    rows = [fields, *([str(x) for x in line] for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(fields))]
    body = (
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return f"{title}\n" + "\n".join(body) + "\n"


def growth(line: Any, before: Any) -> Iterator[str]:
    """What is worse than it was, of what every table has."""
    if line.registers > before.registers * GROWTH:
        yield f"takes {line.registers} registers, {before.registers} before"
    if line.spilled > before.spilled:
        yield f"spills {line.spilled} bytes, {before.spilled} before"
    if line.blocks < before.blocks:
        yield f"fits {line.blocks} times on a multiprocessor, {before.blocks} before"
