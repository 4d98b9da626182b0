"""How layer norm and softmax cut their rows: pure functions of shape and machine, so that the first
call tunes nothing."""

from __future__ import annotations

from typing import NamedTuple

from .kernel import next_power_of_two

IN_REGISTERS = 32768  # numbers of a row that the registers of one program hold
BACKWARD_IN_REGISTERS = 8192  # as many, where two gradients gather beside two inputs
LOOP_BLOCK = 8192  # of a longer row, at a time
_TILE = 4096  # numbers that short rows are put together to


class RowConfig(NamedTuple):
    block_rows: int
    block_width: int
    num_warps: int
    looped: bool  # the row does not fit: it is walked, block by block


def row_config(
    width: int, rows: int, limit: int = IN_REGISTERS, loop_block: int = LOOP_BLOCK
) -> RowConfig:
    """Tiles of (block_rows, block_width): whole rows where they fit, several of them if short."""
    block_width = max(next_power_of_two(width), 16)
    looped = block_width > limit
    if looped:
        block_width = loop_block
    block_rows = max(1, min(_TILE // block_width, next_power_of_two(rows), 64))
    return RowConfig(block_rows, block_width, warps_for(block_rows * block_width), looped)


def column_config(width: int, inner: int, limit: int = 16384) -> RowConfig:
    """The same for columns, adjacent in memory: block_rows counts them, at least 32 where there are
    as many, for whole cache lines."""
    columns = next_power_of_two(inner)
    block_width = max(next_power_of_two(width), 16)
    block_columns = min(columns, 32)
    looped = block_width * block_columns > limit
    if looped:
        block_width = _TILE // block_columns
    else:
        block_columns = max(block_columns, min(columns, _TILE // block_width))
    return RowConfig(block_columns, block_width, warps_for(block_columns * block_width), looped)


def warps_for(numbers: int) -> int:
    """16 numbers a thread, between 1 and 16 warps."""
    return max(1, min(numbers // 512, 16))
