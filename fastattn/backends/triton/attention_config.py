"""Which tiles, warps and stages: pure functions of shape, dtype and architecture, so that the first
call tunes nothing.

The numbers come from the generated code (`tests/kernel_table`): the largest tiles
that do not spill registers, and fit the shared memory of the architecture, for each size of head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .kernel import next_power_of_two

CACHE = 16 * 2**20  # bytes of keys and values that programs at work together should read
LARGE = 256  # queries and keys from which descriptors and specialised warps are worth their cost


class Config(NamedTuple):
    block_m: int  # queries of a tile
    block_n: int  # keys
    num_warps: int
    num_stages: int
    tma: bool = False  # tiles come by tensor descriptors, where the tensors allow it
    specialize: bool = False  # warps that fetch and warps that multiply, where the call allows it


class BackwardConfig(NamedTuple):
    rows: Config
    dq: Config
    dkdv: Config
    dbias: Config


# Forward, dq, dkdv by architecture and columns of a head, of 16-bit numbers.
Sweeps = tuple[Config, Config, Config]
_TABLE: dict[str, dict[int, Sweeps]] = {
    "sm_80": {
        64: (Config(128, 64, 4, 3), Config(128, 64, 8, 2), Config(64, 128, 8, 2)),
        128: (Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(32, 64, 8, 2)),
    },
    "other": {  # fits 99 KiB of shared memory
        64: (Config(128, 64, 4, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(32, 64, 8, 2)),
        256: (Config(64, 32, 8, 2), Config(32, 32, 4, 1), Config(32, 32, 8, 1)),
        512: (Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    },
    "sm_90": {
        64: (
            Config(128, 128, 8, 2, tma=True),
            Config(128, 64, 8, 2, tma=True),
            Config(64, 128, 8, 2, tma=True),
        ),
        128: (
            Config(128, 64, 8, 3, tma=True),
            Config(128, 64, 8, 2, tma=True),
            Config(32, 128, 8, 3, tma=True),
        ),
        # dk and dv of 64 keys, which a group of warps needs to multiply as one, would spill.
        256: (Config(64, 32, 8, 2), Config(64, 32, 8, 2, tma=True), Config(32, 32, 8, 1)),
    },
    "sm_100": {
        64: (
            Config(128, 64, 8, 3, tma=True),
            Config(128, 64, 8, 2, tma=True),
            Config(64, 128, 8, 2, tma=True),
        ),
        128: (
            Config(128, 64, 8, 3, tma=True),
            Config(128, 64, 8, 2, tma=True),
            Config(64, 128, 8, 2, tma=True),
        ),
        256: (Config(64, 32, 8, 2), Config(64, 32, 8, 2, tma=True), Config(32, 64, 8, 2, tma=True)),
    },
    "sm_120": {
        64: (Config(128, 64, 8, 2, tma=True), Config(64, 64, 4, 2), Config(64, 64, 8, 2)),
        128: (
            Config(128, 64, 8, 2, tma=True),
            Config(64, 64, 8, 2, tma=True),
            Config(64, 64, 8, 2, tma=True),
        ),
    },
    "gfx": {  # 64 KiB of shared memory, twice the registers
        64: (Config(128, 64, 4, 1), Config(128, 64, 4, 1), Config(64, 64, 4, 1)),
        128: (Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
        256: (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
        512: (Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    },
    # The interpreter: few tiles, for each takes its time, but enough to test how they are walked.
    "cpu": {64: (Config(32, 64, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 4, 1))},
}
# Products of float32 keep whole rows of both sides in registers.
_FLOAT32: dict[int, Sweeps] = {
    64: (Config(64, 32, 8, 1), Config(64, 32, 8, 1), Config(32, 64, 8, 1)),
    128: (Config(32, 16, 4, 1), Config(32, 16, 8, 1), Config(16, 32, 8, 1)),
    256: (Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    512: (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}
_SPECIALIZED = {
    "sm_90": Config(128, 128, 4, 2, tma=True, specialize=True),
    "sm_100": Config(128, 128, 8, 2, tma=True, specialize=True),
}


def _sweeps(arch: str, dtype: torch.dtype, head_dim: int, v_dim: int) -> Sweeps:
    size = max(64, columns(head_dim), columns(v_dim))
    if arch == "cpu":
        return _TABLE["cpu"][64]
    if dtype is torch.float32:
        return _FLOAT32[size]
    table = _TABLE.get("gfx" if arch.startswith("gfx") else arch, {})
    return table.get(size) or _TABLE["other"][size]


def columns(head_dim: int) -> int:
    """A head dim in registers: a power of two, and at least what tl.dot takes."""
    return max(16, next_power_of_two(head_dim))


def forward_config(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    v_dim: int,
    rows: int,
    k_len: int,
    special: bool,
    plain: bool = True,
) -> Config:
    """``rows``: what there is for a tile to take; ``special``: specialised warps can serve it;
    ``plain``: nothing but a mask, which takes no registers, stands between product and softmax."""
    # Beyond LARGE all lengths are one: keys that grow with each token ask but once.
    rows, k_len = min(rows, LARGE), min(k_len, LARGE)
    return _forward_config(arch, dtype, head_dim, v_dim, rows, k_len, special, plain)


@functools.lru_cache(1024)
def _forward_config(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    v_dim: int,
    rows: int,
    k_len: int,
    special: bool,
    plain: bool,
) -> Config:
    large = min(rows, k_len) >= LARGE
    if large and special and arch in _SPECIALIZED and max(head_dim, v_dim) <= 128:
        return _SPECIALIZED[arch]
    config = _sweeps(arch, dtype, head_dim, v_dim)[0]
    if arch == "sm_80" and not plain and max(head_dim, v_dim) > 64 and config.block_n == 64:
        config = config._replace(block_n=32)  # beside a bias or dropout, 64 keys would spill
    fit = max(16, next_power_of_two(rows))
    if fit < config.block_m:
        config = config._replace(block_m=fit)
        if fit <= 32 and config.block_n == 64 and arch.startswith("sm"):  # decode: fetch far ahead
            config = config._replace(num_warps=8 if max(head_dim, v_dim) > 64 else 4, num_stages=3)
    return config if large else config._replace(tma=False)


def backward_config(
    arch: str, dtype: torch.dtype, head_dim: int, v_dim: int, q_len: int, k_len: int
) -> BackwardConfig:
    return _backward_config(arch, dtype, head_dim, v_dim, min(q_len, k_len) >= LARGE)


@functools.lru_cache(1024)
def _backward_config(
    arch: str, dtype: torch.dtype, head_dim: int, v_dim: int, large: bool
) -> BackwardConfig:
    _, dq, dkdv = _sweeps(arch, dtype, head_dim, v_dim)
    if not large:  # descriptors take the host longer than they save
        dq, dkdv = dq._replace(tma=False), dkdv._replace(tma=False)
    small = Config(min(dq.block_m, 32), min(dq.block_n, 32), 4, 1)
    return BackwardConfig(small, dq, dkdv, small)


@functools.lru_cache(1024)
def attention_problem(
    dtype: torch.dtype, head_dim: int, v_dim: int, rows: int, special: bool = False
) -> str:
    """Under what a tuned configuration is kept: few rows, as in decoding, are another problem."""
    name = str(dtype).removeprefix("torch.")
    name = f"{name}, head dims {columns(head_dim)} {columns(v_dim)}, {min(rows, 128)} rows or more"
    return f"{name}, plain" if special else name


def heads_together(heads: int, kv_bytes: int, sharing: int, even: bool) -> int:
    """How many query heads of all ``heads`` are at work at the same time, ``sharing`` of which read
    the same keys.

    Where all tiles have the same work (``even``) one head after the other serves the cache best;
    else tiles of several heads, longest first, keep the device busy to the end.
    """
    if even:
        return 1
    return min(heads, max(1, CACHE // max(kv_bytes, 1)) * sharing)


def key_splits(programs: int, k_len: int, block_n: int, processors: int) -> tuple[int, int]:
    """(splits, keys of each): programs for the whole device, each with keys worth its start."""
    most = max(1, k_len // max(4 * block_n, 128))
    splits = min(max(1, 2 * processors // max(programs, 1)), most, 128)
    blocks = -(-k_len // block_n)
    chunk = -(-blocks // splits) * block_n if blocks else block_n
    return max(1, -(-k_len // chunk)), chunk
