"""One tile of scores: what forward, decode and backward share.

Index tensors are two-dimensional and broadcast: queries i (M, 1) and keys j (1, N), or the other
way round for a transposed tile. ``at.head`` is a number, or has i's shape where the rows of a tile
belong to several heads. The order is the library's definition:
    scale -> softcap -> ALiBi -> bias -> mask -> softmax -> dropout
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import AttentionCall
from . import INTERPRETED
from .attention_config import Config, columns
from .kernel import LOG2E, View, describable, float32_precision
from .mask import Mask, visible
from .philox import philox, threshold

_LOG2E = tl.constexpr(LOG2E)
# Whether it is worth asking for what else adds zeros: a minute of the interpreter's tests, but on a
# GPU registers of the loops that matter.
_SKIPS = tl.constexpr(INTERPRETED)


class Sizes(NamedTuple):
    heads: Any
    group: Any  # query heads of a KV head
    q_len: Any
    k_len: Any


class Score(NamedTuple):
    """From q.k to the logit. None: not there, at compile time."""

    scale: Any
    softcap: Any
    slopes: Any  # View (B, Hq) of ALiBi slopes
    bias: Any  # View; bool: True = attend


class Dropout(NamedTuple):
    seed: Any  # the tensor
    threshold: Any
    scale: Any  # of what is kept


class Problem(NamedTuple):
    """One call, all but its tensors q, k, v and out."""

    sizes: Any
    mask: Any
    score: Any
    dropout: Any  # None: off


class Head(NamedTuple):
    """Where a program, or each of its rows, is at work."""

    batch: Any
    head: Any
    kv_head: Any


class Static(NamedTuple):
    """What is decided at compile time, beside what is None."""

    head_dim: int
    v_dim: int
    d: int  # the same as powers of two, which is what registers hold
    dv: int
    block_m: int  # queries of a tile
    block_n: int  # keys
    modified: bool  # logits are made in natural units; else they stay in units of 1 / scale
    exact: bool  # a difference of logits is taken before it is scaled: float32
    grouped: bool  # the rows of a tile are of all heads that share a KV head
    precision: str  # tl.dot's, of float32
    tma: int  # rank of the descriptors of what a loop walks: 4, of all; 2, of one head; 0: none
    specialize: bool  # warps that fetch, warps that multiply


def problem_of(call: AttentionCall) -> Problem:
    heads, q_len = call.q.shape[1:3]
    kv_heads, k_len = call.k.shape[1:3]
    bias, slopes, p = call.bias, call.alibi_slopes, call.dropout_p
    return Problem(
        Sizes(heads, heads // max(kv_heads, 1), q_len, k_len),
        Mask.of(call.left, call.right, call.shift, q_len, k_len),
        Score(
            float(call.scale),
            float(call.softcap) if call.softcap else None,
            None if slopes is None else View.of(slopes),
            None if bias is None else View.of(bias),
        ),
        None
        if p == 0 or call.seed is None
        else Dropout(call.seed, threshold(p), 0.0 if p >= 1 else 1 / (1 - p)),
    )


def is_plain(call: AttentionCall, problem: Problem) -> bool:
    """Nothing but a mask and a positive scale, which the exponent takes along; not for float32."""
    score = problem.score
    bare = problem.dropout is None and all(x is None for x in score[1:])
    return bare and score.scale > 0 and call.q.dtype is not torch.float32


def static_of(
    call: AttentionCall,
    score: Score,
    config: Config,
    walked: tuple[Tensor, ...] = (),
    grouped: bool = False,
) -> Static:
    """``walked``: the tensors of which a loop fetches tiles."""
    head_dim, v_dim, dtype = call.q.shape[3], call.v.shape[3], call.q.dtype
    float32 = dtype is torch.float32
    tma = config.tma and all(map(describable, walked)) and len(walked) > 0
    # Is there no more than a positive scale, the exponent takes it along.
    plain = score.scale > 0 and all(x is None for x in score[1:])
    return Static(
        head_dim=head_dim,
        v_dim=v_dim,
        d=columns(head_dim),
        dv=columns(v_dim),
        block_m=config.block_m,
        block_n=config.block_n,
        modified=not plain or float32,
        exact=float32,
        grouped=grouped,
        precision=float32_precision() if float32 else "ieee",
        tma=4 if tma else 0,
        specialize=False,
    )


@triton.jit
def tile_and_head(length, ROWS: tl.constexpr):
    """(tile of ROWS of ``length``, head of all batches). Grids are of one dimension: the others
    have room for 65,535 programs."""
    program = tl.program_id(0)
    tiles = tl.cdiv(length, ROWS)
    return program % tiles, program // tiles


# ---------------------------------------------------------------------------------- loads, stores


@triton.jit
def load_rows(x, at, i, i_end, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows i (M, 1) of the heads ``at`` as (M, COLUMNS); zeros from i_end and from WIDTH on."""
    d = tl.arange(0, COLUMNS)[None, :]
    rows = at.batch.to(tl.int64) * x.b + at.head.to(tl.int64) * x.h + i.to(tl.int64) * x.s
    inside = i < i_end
    if WIDTH != COLUMNS:
        inside = inside & (d < WIDTH)
    return tl.load(x.ptr + rows + d.to(tl.int64) * x.d, mask=inside, other=0.0)


@triton.jit
def store_rows(x, values, at, i, i_end, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse of load_rows."""
    d = tl.arange(0, COLUMNS)[None, :]
    rows = at.batch.to(tl.int64) * x.b + at.head.to(tl.int64) * x.h + i.to(tl.int64) * x.s
    inside = i < i_end
    if WIDTH != COLUMNS:
        inside = inside & (d < WIDTH)
    values = values.to(x.ptr.dtype.element_ty)
    tl.store(x.ptr + rows + d.to(tl.int64) * x.d, values, mask=inside)


@triton.jit
def load_tile(
    x,
    batch,
    head,
    row,
    row_end,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows [row, row + ROWS) of one head as (ROWS, COLUMNS); zeros from row_end, if CHECKED, and
    from WIDTH on. With TMA, x is a descriptor of that rank, which knows where the tensor ends."""
    if TMA == 4:
        return x.load([batch, head, row, 0]).reshape([ROWS, COLUMNS])
    elif TMA == 2:
        return x.load([row, 0])
    else:
        r = tl.arange(0, ROWS)[:, None]
        d = tl.arange(0, COLUMNS)[None, :]
        # What changes from tile to tile is one number; the rest can stay in registers.
        start = batch.to(tl.int64) * x.b + head.to(tl.int64) * x.h + tl.cast(row, tl.int64) * x.s
        address = x.ptr + start + (r.to(tl.int64) * x.s + d.to(tl.int64) * x.d)
        r += row
        if CHECKED and WIDTH != COLUMNS:
            tile = tl.load(address, mask=(r < row_end) & (d < WIDTH), other=0.0)
        elif CHECKED:
            tile = tl.load(address, mask=r < row_end, other=0.0)
        elif WIDTH != COLUMNS:
            tile = tl.load(address, mask=d < WIDTH, other=0.0)
        else:
            tile = tl.load(address)
        return tile


@triton.jit
def load_keys(k, at, start, problem, static: tl.constexpr, CHECKED: tl.constexpr):
    """(N, D)"""
    return load_tile(
        k, at.batch, at.kv_head, start, problem.sizes.k_len,
        static.block_n, static.head_dim, static.d, CHECKED, static.tma,
    )  # fmt: skip


@triton.jit
def load_values(v, at, start, problem, static: tl.constexpr, CHECKED: tl.constexpr):
    """(N, Dv)"""
    return load_tile(
        v, at.batch, at.kv_head, start, problem.sizes.k_len,
        static.block_n, static.v_dim, static.dv, CHECKED, static.tma,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- scores


@triton.jit
def tanh(x):
    """To float32's precision, relative to the result: Taylor's series where exp would cancel."""
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    t = tl.exp2(tl.abs(x) * (-2 * _LOG2E))
    t = (1 - t) / (1 + t)
    return tl.where(x2 < 0.09, series, tl.where(x < 0, -t, t))


@triton.jit
def exp_factor(score, static: tl.constexpr):
    """exp(logit) = exp2(factor * x) of an x from make_logits."""
    return _LOG2E if static.modified else score.scale * _LOG2E


@triton.jit
def make_logits(x, at, i, j, problem, MODIFIED: tl.constexpr, MASKED: tl.constexpr):
    """q.k -> logits, -inf where hidden; unless MODIFIED they stay in units of 1 / scale.

    Also returns tanh(scale x / softcap), of which the derivative is made, where there is a softcap.
    """
    score = problem.score
    y = x
    if MODIFIED:
        x = x * score.scale
        if score.softcap is not None:
            y = tanh(x / score.softcap)
            x = score.softcap * y
        if score.slopes is not None:
            slopes = score.slopes
            row = at.batch.to(tl.int64) * slopes.b + at.head.to(tl.int64) * slopes.h
            distance = tl.abs(i + problem.mask.shift - j).to(tl.float32)
            x = x - tl.load(slopes.ptr + row) * distance
        if score.bias is not None:
            bias = load_bias(score.bias, at, i, j, problem.sizes, MASKED)
            # A bias of -inf hides also what is NaN or infinite.
            x = tl.where(bias == -float("inf"), -float("inf"), x + bias)
    if MASKED:
        x = tl.where(visible(i, j, problem.sizes.k_len, problem.mask), x, -float("inf"))
    return x, y


@triton.jit
def load_bias(bias, at, i, j, sizes, MASKED: tl.constexpr):
    """float32; of a boolean bias 0 where True, else -inf. The mask of an inner tile is the same all
    along its keys, so that they can be loaded several at a time."""
    row = at.batch.to(tl.int64) * bias.b + at.head.to(tl.int64) * bias.h + i.to(tl.int64) * bias.s
    inside = i < sizes.q_len
    if MASKED:
        inside = inside & (j < sizes.k_len)
    value = tl.load(bias.ptr + row + j.to(tl.int64) * bias.d, mask=inside, other=0)
    if bias.ptr.dtype.element_ty == tl.int1:
        return tl.where(value, 0.0, -float("inf"))
    else:
        return value.to(tl.float32)


@triton.jit
def kept(dropout, at, i, start, N: tl.constexpr):
    """(M, N) whether dropout keeps queries i (M, 1) and keys [start, start + N): a counter gives
    four words, so start is a multiple of four."""
    quad = start // 4 + tl.arange(0, N // 4)[None, :]
    w0, w1, w2, w3 = philox(tl.load(dropout.seed), quad, i, at.head, at.batch)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= dropout.threshold.to(tl.uint32)


# ------------------------------------------------------------------------------ what must not leak


@triton.jit
def unsound(x):
    """Whether a tile holds a NaN or an infinity, which its sum then is too. (A sum that overflows
    by itself costs no more than doing the tile again.)"""
    total = tl.sum(x)
    return total - total != 0


@triton.jit
def careful_dot(a, b, seen, acc, PRECISION: tl.constexpr):
    """``acc + a . b``, of which row i takes only what it sees: a is 0 elsewhere, but 0 * nan is
    nan. a and seen are (R, C), b is (C, D). For the rare tile that holds a NaN or an infinity."""
    C: tl.constexpr = b.shape[0]
    special = b - b != 0
    clean = tl.where(special, 0.0, b).to(b.dtype)
    acc = tl.dot(a.to(b.dtype), clean, acc, input_precision=PRECISION)
    if unsound(b.to(tl.float32)):
        columns = tl.arange(0, C)
        for c in range(0, C):
            this = columns == c
            if _SKIPS:
                if tl.max((this[:, None] & special).to(tl.int32)) > 0:
                    acc = _add_special(a, b, seen, special, this, acc)
            else:
                acc = _add_special(a, b, seen, special, this, acc)
    return acc


@triton.jit
def _add_special(a, b, seen, special, this, acc):
    """What is NaN or infinite in the row of b where ``this`` (C,) is true."""
    weight = tl.sum(tl.where(this[None, :], a.to(tl.float32), 0.0), 1)  # (R,)
    sees = tl.max((this[None, :] & seen).to(tl.int32), 1) > 0
    value = tl.sum(tl.where(this[:, None] & special, b.to(tl.float32), 0.0), 0)  # (D,)
    term = weight[:, None] * value[None, :]
    return acc + tl.where(sees[:, None] & (value - value != 0)[None, :], term, 0.0)
