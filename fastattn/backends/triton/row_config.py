"""How layer norm and softmax cut their rows: pure functions of shape and machine, so that the first
call tunes nothing."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .kernel import next_power_of_two

# Numbers of a row that the registers of one program hold without spilling, kernel by kernel: the
# table of the generated code (tests/kernel_table) watches over them.
SOFTMAX_IN_REGISTERS = 32768
SOFTMAX_BACKWARD_IN_REGISTERS = 16384
LAYER_NORM_BYTES_IN_REGISTERS = 65536
LAYER_NORM_BACKWARD_IN_REGISTERS = 8192  # two gradients gather beside two inputs
_COLUMNS_IN_REGISTERS = 16384
LOOP_BLOCK = 8192  # of a longer row, at a time
_TILE = 4096  # numbers that short rows are put together to


class RowConfig(NamedTuple):
    block_rows: int
    block_width: int
    num_warps: int
    looped: bool  # the row does not fit: it is walked, block by block


@functools.lru_cache(1024)
def row_config(arch: str, width: int, rows: int, limit: int) -> RowConfig:
    """Tiles of (block_rows, block_width): whole rows where they fit, several of them if short."""
    block_width = max(next_power_of_two(width), 16)
    looped = block_width > limit
    if looped:
        block_width = LOOP_BLOCK
    block_rows = max(1, min(_TILE // block_width, next_power_of_two(rows), 64))
    return RowConfig(block_rows, block_width, warps_for(arch, block_rows * block_width), looped)


@functools.lru_cache(1024)
def column_config(arch: str, width: int, inner: int) -> RowConfig:
    """The same for columns, adjacent in memory: block_rows counts them, at least 32 where there are
    as many, for whole cache lines."""
    columns = next_power_of_two(inner)
    block_width = max(next_power_of_two(width), 16)
    block_columns = min(columns, 32)
    looped = block_width * block_columns > _COLUMNS_IN_REGISTERS
    if looped:
        block_width = _TILE // block_columns
    else:
        block_columns = max(block_columns, min(columns, _TILE // block_width))
    warps = warps_for(arch, block_columns * block_width)
    return RowConfig(block_columns, block_width, warps, looped)


def layer_norm_config(arch: str, dtype: torch.dtype, width: int, rows: int) -> RowConfig:
    return row_config(arch, width, rows, LAYER_NORM_BYTES_IN_REGISTERS // dtype.itemsize)


def layer_norm_backward_config(arch: str, width: int, rows: int) -> RowConfig:
    return row_config(arch, width, rows, LAYER_NORM_BACKWARD_IN_REGISTERS)


def softmax_config(arch: str, sizes: tuple[int, ...], backward: bool = False) -> RowConfig:
    """``sizes`` as ``columns_of`` gives them."""
    n0, n1, n2, width, inner = sizes
    if inner > 1:
        return column_config(arch, width, inner)
    limit = SOFTMAX_BACKWARD_IN_REGISTERS if backward else SOFTMAX_IN_REGISTERS
    return row_config(arch, width, n0 * n1 * n2, limit)


@functools.lru_cache(1024)
def row_problem(dtype: torch.dtype, config: RowConfig) -> str:
    """Under what a tuned configuration is kept."""
    return f"{str(dtype).removeprefix('torch.')}, {config.block_width} wide"


def warps_for(arch: str, numbers: int) -> int:
    """16 numbers a thread, and at most the 1024 threads that a program can have."""
    warp = 64 if arch.startswith("gfx9") else 32
    return max(1, min(numbers // 16, 1024) // warp)


def column_tile(width: int, processors: int, least: int) -> tuple[int, int]:
    """(rows, columns) of a tile of 4096 numbers, of a tensor that is summed over its rows: two
    programs or so for each multiprocessor, ``least`` columns or more."""
    columns = next_power_of_two(width // (2 * processors))
    columns = max(least, min(columns, 1024))
    return _TILE // columns, columns
