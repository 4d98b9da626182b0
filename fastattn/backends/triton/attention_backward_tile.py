"""One tile of the backward: p and ds from lse, and what it needs to know of each row.

The formulas are at the head of attention_backward.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_tile import (
    Head,
    Problem,
    exp_factor,
    load_keys,
    load_rows,
    make_logits,
    tile_and_head,
)
from .kernel import LOG2E
from .mask import any_keys

_LOG2E = tl.constexpr(LOG2E)
_INEXACT = tl.constexpr(800.0)  # an lse so large is rounded by more than 1e-4 of a probability


class Rows(NamedTuple):
    """What the backward knows of each query: float32 (B, Hq, Sq), contiguous."""

    delta: Any
    reference: Any  # lse; inf where no key is seen, NaN where lse is too large
    high: Any  # carefully, p = exp2((x - high) * factor - low)
    low: Any


class Tensors(NamedTuple):
    q: Any
    k: Any
    v: Any
    dout: Any
    rows: Any


class Outputs(NamedTuple):
    """Views and addresses of what is written; None: not asked for."""

    dq: Any
    dk: Any
    dv: Any
    dbias: Any  # an element a score
    row_sums: Any  # (B, Hq, Sq) of dlogit, for a bias that is the same for all keys


# --------------------------------------------------------------------------------- row by row


@triton.jit
def _sum_again(x, i, at, begin, end, sinks, problem, static: tl.constexpr):
    """high and low of rows i (M,) from the scores themselves."""
    queries = load_rows(x.q, at, i[:, None], problem.sizes.q_len, static.head_dim, static.d)
    factor = exp_factor(problem.score, static)
    m = tl.full(i.shape, -float("inf"), tl.float32)
    total = tl.zeros(i.shape, tl.float32)
    for start in tl.range(begin, end, static.block_n, num_stages=1):
        j = start + tl.arange(0, static.block_n)[None, :]
        keys = load_keys(x.k, at, start, problem, static, True)
        s = tl.dot(queries, tl.trans(keys), input_precision=static.precision)
        s, _ = make_logits(s, at, i[:, None], j, problem, static.modified, True)
        top = tl.maximum(m, tl.max(s, 1))
        reference = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp2((m - reference) * factor)
        total += tl.sum(tl.exp2((s - reference[:, None]) * factor), 1)
        m = top
    high = tl.where(m == -float("inf"), 0.0, m)
    if sinks is not None:
        total += tl.exp2(tl.load(sinks + at.head).to(tl.float32) * _LOG2E - high * factor)
    return high, tl.log2(total)


@triton.jit(do_not_specialize=["sizes", "mask", "dropout"])
def attention_rows_kernel(
    x,
    out,
    lse,
    dlse,
    sinks,
    sizes,
    mask,
    score,
    dropout,
    static: tl.constexpr,
):
    """A program: Rows of a tile of queries."""
    problem = Problem(sizes, mask, score, dropout)
    M: tl.constexpr = static.block_m
    tile, number = tile_and_head(sizes.q_len, M)
    head = number % sizes.heads
    at = Head(number // sizes.heads, head, head // sizes.group)
    i_begin = tile * M
    i = i_begin + tl.arange(0, M)
    inside = i < sizes.q_len
    row = number.to(tl.int64) * sizes.q_len + i

    # do_i . o_i by the same instructions as do_i . v_j: where one key is seen they cancel.
    o = load_rows(out, at, i[:, None], sizes.q_len, static.v_dim, static.dv)
    do = load_rows(x.dout, at, i[:, None], sizes.q_len, static.v_dim, static.dv)
    product = tl.dot(do, tl.trans(o), input_precision=static.precision)
    delta = tl.sum(tl.where(i[:, None] == i[None, :], product, 0.0), 1)
    if dlse is not None:
        address = dlse.ptr + at.batch.to(tl.int64) * dlse.b + head.to(tl.int64) * dlse.h
        delta -= tl.load(address + i.to(tl.int64) * dlse.s, mask=inside, other=0.0).to(tl.float32)
    log = tl.load(lse + row, mask=inside, other=0.0)
    unit = 1.0 if static.exact else _LOG2E
    reference = tl.where(log == -float("inf"), float("inf"), log * unit)
    inexact = (tl.abs(log) > _INEXACT) & (tl.abs(log) < float("inf"))
    tl.store(x.rows.delta + row, delta, mask=inside)
    zero = tl.zeros((M,), tl.float32)
    high = reference if static.exact else zero
    low = zero if static.exact else reference
    tl.store(x.rows.reference + row, tl.where(inexact, float("nan"), reference), mask=inside)
    tl.store(x.rows.high + row, high, mask=inside & ~inexact)
    tl.store(x.rows.low + row, low, mask=inside & ~inexact)
    if tl.max(inexact.to(tl.int32), 0) > 0:
        begin, end = any_keys(i_begin, tl.minimum(i_begin + M, sizes.q_len), sizes.k_len, mask)
        begin = begin // static.block_n * static.block_n
        high, low = _sum_again(x, i, at, begin, end, sinks, problem, static)
        tl.store(x.rows.high + row, high, mask=inside & inexact)
        tl.store(x.rows.low + row, low, mask=inside & inexact)


# ------------------------------------------------------------------------------------------ tiles


@triton.jit
def load_row_numbers(rows, row, inside, CAREFUL: tl.constexpr):
    """(delta, reference, 0) of rows, or carefully (delta, low, high); p = 0 where not inside."""
    delta = tl.load(rows.delta + row, mask=inside, other=0.0)
    if CAREFUL:
        low = tl.load(rows.low + row, mask=inside, other=float("inf"))
        return delta, low, tl.load(rows.high + row, mask=inside, other=0.0)
    else:
        reference = tl.load(rows.reference + row, mask=inside, other=float("inf"))
        return delta, reference, reference


@triton.jit
def differentiate(
    x,
    dp,
    numbers,
    keep,
    at,
    i,
    j,
    problem,
    static: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """q.k and do.v -> (drop(p) before its scale, dlogit, ds, seen), shaped as they are; of the row
    numbers, each broadcasts. ds is that of scale * q.k."""
    delta, low, high = numbers
    x, y = make_logits(x, at, i, j, problem, static.modified, MASKED)
    factor = exp_factor(problem.score, static)
    seen = x != -float("inf")
    if CAREFUL:
        p = tl.where(seen, tl.exp2((x - high) * factor - low), 0.0)
    elif static.exact:
        p = tl.exp2((x - low) * factor)
    else:
        p = tl.exp2(x * factor - low)
    dropped = p
    if problem.dropout is not None:
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * problem.dropout.scale, 0.0)
    dlogit = p * (dp - delta)
    if CAREFUL:
        dlogit = tl.where(seen, dlogit, 0.0)
    ds = dlogit
    if problem.score.softcap is not None:
        ds = ds * (1 - y * y)
        if CAREFUL:
            ds = tl.where(seen, ds, 0.0)
    return dropped, dlogit, ds, seen
