"""Which tiles, warps and stages: pure functions of shape, dtype and architecture, so that the first
call tunes nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kernel import next_power_of_two

MAX_HEAD_DIM = 512
CACHE = 16 * 2**20  # bytes of keys and values that programs at work together should read


class Config(NamedTuple):
    block_m: int  # queries of a tile
    block_n: int  # keys
    num_warps: int
    num_stages: int
    tma: bool = False  # tiles come by tensor descriptors, where the tensors allow it
    specialize: bool = False  # warps that fetch and warps that multiply


class BackwardConfig(NamedTuple):
    rows: Config
    dq: Config
    dkdv: Config
    dbias: Config


def columns(head_dim: int) -> int:
    """A head dim in registers: a power of two, and at least what tl.dot takes."""
    return max(16, next_power_of_two(head_dim))


def forward_config(arch: str, dtype: torch.dtype, head_dim: int, v_dim: int, rows: int) -> Config:
    """``rows``: what there is for a tile to take."""
    if arch == "cpu":
        return Config(32, 32, 4, 1)
    return Config(64, 32, 4, 2)


def backward_config(arch: str, dtype: torch.dtype, head_dim: int, v_dim: int) -> BackwardConfig:
    if arch == "cpu":
        return BackwardConfig(*[Config(32, 32, 4, 1)] * 4)
    return BackwardConfig(
        Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2), Config(32, 32, 4, 2)
    )


def attention_problem(dtype: torch.dtype, head_dim: int, v_dim: int, rows: int) -> str:
    """Under what a tuned configuration is kept: few rows, as in decoding, are another problem."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}, head dims {columns(head_dim)} {columns(v_dim)}, {min(rows, 128)} rows or more"


def heads_together(kv_bytes: int, sharing: int, even: bool) -> int:
    """How many query heads are at work at the same time, ``sharing`` of which read the same keys.

    Where all tiles have the same work (``even``) one head after the other serves the cache best;
    else tiles of several heads, longest first, keep the device busy to the end.
    """
    if even:
        return 1
    return max(1, CACHE // max(kv_bytes, 1)) * sharing


def key_splits(programs: int, k_len: int, block_n: int, processors: int) -> tuple[int, int]:
    """(splits, keys of each): programs for the whole device, each with keys worth its start."""
    most = max(1, k_len // max(4 * block_n, 128))
    splits = min(max(1, 2 * processors // max(programs, 1)), most, 128)
    blocks = -(-k_len // block_n)
    chunk = -(-blocks // splits) * block_n if blocks else block_n
    return max(1, -(-k_len // chunk)), chunk
