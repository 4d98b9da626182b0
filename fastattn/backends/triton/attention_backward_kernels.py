"""The sweeps of the backward: dq by queries, dk and dv by keys, and a bias that scores share.

The formulas are at the head of attention_backward.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_backward_tile import differentiate, load_row_numbers
from .attention_forward import tile_order
from .attention_tile import (
    Head,
    Problem,
    careful_dot,
    kept,
    load_keys,
    load_rows,
    load_tile,
    load_values,
    store_rows,
    tile_and_head,
    unsound,
)
from .mask import all_keys, all_queries, any_keys, any_queries

_CAREFUL_ROWS = tl.constexpr(16)


# --------------------------------------------------------------------------------------------- dq


@triton.jit
def _walk_keys(
    state,
    x,
    outputs,
    fixed,
    begin,
    end,
    at,
    i,
    problem,
    static: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Adds the keys [begin, end) to state: dq (M, D) and the sums of dlogit (M,)."""
    dq, sums = state
    queries, dout, delta, low, high = fixed
    numbers = (delta[:, None], low[:, None], high[:, None])
    for start in tl.range(
        begin,
        end,
        static.block_n,
        num_stages=1 if CAREFUL else None,
        warp_specialize=static.specialize and not CAREFUL,
    ):
        start = tl.multiple_of(start, static.block_n)
        j = start + tl.arange(0, static.block_n)[None, :]
        keys = load_keys(x.k, at, start, problem, static, MASKED)  # (N, D)
        values = load_values(x.v, at, start, problem, static, MASKED)  # (N, Dv)
        s = tl.dot(queries, tl.trans(keys), input_precision=static.precision)  # (M, N)
        dp = tl.dot(dout, tl.trans(values), input_precision=static.precision)
        keep = s
        if problem.dropout is not None:
            keep = kept(problem.dropout, at, i, start, static.block_n)
        _, dlogit, ds, seen = differentiate(
            s, dp, numbers, keep, at, i, j, problem, static, MASKED, CAREFUL
        )
        if outputs.row_sums is not None:
            sums += tl.sum(dlogit, 1)
        if outputs.dbias is not None:
            store_scores(outputs.dbias, dlogit, at, i, j, problem.sizes)
        if CAREFUL:
            dq = careful_dot(ds, keys, seen, dq, static.precision)
        else:
            dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=static.precision)
    return dq, sums


@triton.jit
def store_scores(x, values, at, i, j, sizes):
    """What belongs to queries i (M, 1) and keys j (1, N) of a head."""
    address = x.ptr + at.batch.to(tl.int64) * x.b + at.head.to(tl.int64) * x.h
    address = address + i.to(tl.int64) * x.s + j.to(tl.int64) * x.d
    inside = (i < sizes.q_len) & (j < sizes.k_len)
    tl.store(address, values.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _start_queries(x, i, at, problem, static: tl.constexpr, CAREFUL: tl.constexpr):
    """What stays the same along the keys, and zeros for the sums."""
    q_len = problem.sizes.q_len
    row = (at.batch * problem.sizes.heads + at.head).to(tl.int64) * q_len + i
    delta, low, high = load_row_numbers(x.rows, row, i < q_len, CAREFUL)
    queries = load_rows(x.q, at, i[:, None], q_len, static.head_dim, static.d)
    dout = load_rows(x.dout, at, i[:, None], q_len, static.v_dim, static.dv)
    state = (tl.zeros((i.shape[0], static.d), tl.float32), tl.zeros((i.shape[0],), tl.float32))
    return (queries, dout, delta, low, high), state


@triton.jit
def _finish_queries(state, outputs, i, at, problem, static: tl.constexpr):
    dq, sums = state
    q_len = problem.sizes.q_len
    if outputs.dq is not None:
        dq = dq * problem.score.scale
        store_rows(outputs.dq, dq, at, i[:, None], q_len, static.head_dim, static.d)
    if outputs.row_sums is not None:
        row = (at.batch * problem.sizes.heads + at.head).to(tl.int64) * q_len + i
        tl.store(outputs.row_sums + row, sums, mask=i < q_len)


@triton.jit
def _queries_again(x, outputs, i, at, begin, end, problem, static: tl.constexpr):
    fixed, state = _start_queries(x, i, at, problem, static, True)
    state = _walk_keys(
        state, x, outputs, fixed, begin, end, at, i[:, None], problem, static, True, True
    )
    _finish_queries(state, outputs, i, at, problem, static)


@triton.jit(do_not_specialize=["sizes", "mask", "dropout", "order"])
def attention_dq_kernel(x, outputs, sizes, mask, score, dropout, order, static: tl.constexpr):
    """A program: a tile of queries with all keys that they see."""
    problem = Problem(sizes, mask, score, dropout)
    M: tl.constexpr = static.block_m
    N: tl.constexpr = static.block_n
    tile, number = tile_order(order)
    head = number % sizes.heads
    at = Head(number // sizes.heads, head, head // sizes.group)
    i_begin = tile * M
    i_end = tl.minimum(i_begin + M, sizes.q_len)
    begin, end = any_keys(i_begin, i_end, sizes.k_len, mask)
    all_begin, all_end = all_keys(i_begin, i_end, sizes.k_len, mask)
    begin = begin // N * N
    all_begin = tl.maximum(tl.cdiv(all_begin, N) * N, begin)
    all_end = tl.maximum(all_end // N * N, all_begin)

    i = i_begin + tl.arange(0, M)
    i2 = i[:, None]
    fixed, state = _start_queries(x, i, at, problem, static, False)
    if mask.left is not None:
        first = tl.minimum(all_begin, end)
        state = _walk_keys(
            state, x, outputs, fixed, begin, first, at, i2, problem, static, True, False
        )
    state = _walk_keys(
        state, x, outputs, fixed, all_begin, all_end, at, i2, problem, static, False, False
    )
    state = _walk_keys(state, x, outputs, fixed, all_end, end, at, i2, problem, static, True, False)
    if unsound(state[0]):
        for first in range(0, M, _CAREFUL_ROWS):
            rows = i_begin + first + tl.arange(0, _CAREFUL_ROWS)
            _queries_again(x, outputs, rows, at, begin, end, problem, static)
    else:
        _finish_queries(state, outputs, i, at, problem, static)


# -------------------------------------------------------------------------------------- dk and dv


@triton.jit
def _walk_queries(
    state,
    x,
    fixed,
    begin,
    end,
    shared,
    first,
    problem,
    static: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Adds the queries [begin, end) of all heads of the group to state: dk (N, D), dv (N, Dv)."""
    dk, dv = state
    keys, values = fixed
    M: tl.constexpr = static.block_m
    N: tl.constexpr = keys.shape[0]
    sizes = problem.sizes
    j = first + tl.arange(0, N)[:, None]
    # One loop, not one in another: tiles are fetched ahead also from one head to the next.
    tiles = tl.cdiv(tl.maximum(end - begin, 0), M)
    for n in tl.range(
        0,
        tiles * sizes.group,
        num_stages=1 if CAREFUL else None,
        warp_specialize=static.specialize and not CAREFUL,
    ):
        head = shared.kv_head * sizes.group + n // tiles
        at = Head(shared.batch, head, shared.kv_head)
        start = begin + n % tiles * M
        i = start + tl.arange(0, M)
        queries = load_tile(
            x.q,
            at.batch,
            head,
            start,
            sizes.q_len,
            M,
            static.head_dim,
            static.d,
            MASKED,
            static.tma,
        )  # (M, D)
        dout = load_tile(
            x.dout, at.batch, head, start, sizes.q_len, M, static.v_dim, static.dv, MASKED,
            static.tma,
        )  # (M, Dv)  # fmt: skip
        row = (at.batch * sizes.heads + head).to(tl.int64) * sizes.q_len + i
        delta, low, high = load_row_numbers(x.rows, row, i < sizes.q_len, CAREFUL)
        numbers = (delta[None, :], low[None, :], high[None, :])
        s = tl.dot(keys, tl.trans(queries), input_precision=static.precision)  # (N, M)
        dp = tl.dot(values, tl.trans(dout), input_precision=static.precision)
        keep = s
        if problem.dropout is not None:
            keep = tl.trans(kept(problem.dropout, at, i[:, None], first, N))
        p, _, ds, seen = differentiate(
            s, dp, numbers, keep, at, i[None, :], j, problem, static, MASKED, CAREFUL
        )
        if CAREFUL:
            dv = careful_dot(p, dout, seen, dv, static.precision)
            dk = careful_dot(ds, queries, seen, dk, static.precision)
        else:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=static.precision)
            dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=static.precision)
    return dk, dv


@triton.jit
def _take_keys(x, first, N: tl.constexpr, shared, problem, static: tl.constexpr, CAREFUL):
    """(dk, dv) of keys [first, first + N), before their scales."""
    sizes, mask = problem.sizes, problem.mask
    M: tl.constexpr = static.block_m
    begin, end = any_queries(first, tl.minimum(first + N, sizes.k_len), sizes.q_len, mask)
    all_begin, all_end = all_queries(first, first + N, sizes.q_len, mask)
    begin = begin // M * M
    all_begin = tl.maximum(tl.cdiv(all_begin, M) * M, begin)
    all_end = tl.maximum(all_end // M * M, all_begin)
    if first + N > sizes.k_len:  # what lies beyond the last key must be hidden from all queries
        all_end = all_begin

    j = first + tl.arange(0, N)[:, None]
    keys = load_rows(x.k, shared, j, sizes.k_len, static.head_dim, static.d)  # (N, D)
    values = load_rows(x.v, shared, j, sizes.k_len, static.v_dim, static.dv)  # (N, Dv)
    fixed = (keys, values)
    state = (tl.zeros((N, static.d), tl.float32), tl.zeros((N, static.dv), tl.float32))
    if CAREFUL:
        state = _walk_queries(
            state, x, fixed, begin, end, shared, first, problem, static, True, True
        )
    else:
        if mask.right is not None:
            end_first = tl.minimum(all_begin, end)
            state = _walk_queries(
                state, x, fixed, begin, end_first, shared, first, problem, static, True, False
            )
        state = _walk_queries(
            state, x, fixed, all_begin, all_end, shared, first, problem, static, False, False
        )
        state = _walk_queries(
            state, x, fixed, all_end, end, shared, first, problem, static, True, False
        )
    return state


@triton.jit
def _finish_keys(state, outputs, first, shared, problem, static: tl.constexpr):
    dk, dv = state
    j = first + tl.arange(0, dk.shape[0])[:, None]
    k_len = problem.sizes.k_len
    if outputs.dk is not None:
        dk = dk * problem.score.scale
        store_rows(outputs.dk, dk, shared, j, k_len, static.head_dim, static.d)
    if outputs.dv is not None:
        if problem.dropout is not None:
            dv = dv * problem.dropout.scale
        store_rows(outputs.dv, dv, shared, j, k_len, static.v_dim, static.dv)


@triton.jit
def _keys_again(x, outputs, first, shared, problem, static: tl.constexpr):
    state = _take_keys(x, first, _CAREFUL_ROWS, shared, problem, static, True)
    _finish_keys(state, outputs, first, shared, problem, static)


@triton.jit(do_not_specialize=["sizes", "mask", "dropout", "order"])
def attention_dkdv_kernel(x, outputs, sizes, mask, score, dropout, order, static: tl.constexpr):
    """A program: a tile of keys of a KV head with all queries that see them."""
    problem = Problem(sizes, mask, score, dropout)
    N: tl.constexpr = static.block_n
    tile, number = tile_order(order)
    tile = order.tiles - 1 - tile  # causal: the first keys are seen by the most queries
    kv_heads = sizes.heads // sizes.group
    kv_head = number % kv_heads
    shared = Head(number // kv_heads, kv_head, kv_head)
    state = _take_keys(x, tile * N, N, shared, problem, static, False)
    if unsound(state[0]) or unsound(state[1]):
        for part in range(0, N, _CAREFUL_ROWS):
            _keys_again(x, outputs, tile * N + part, shared, problem, static)
    else:
        _finish_keys(state, outputs, tile * N, shared, problem, static)


# -------------------------------------------------------------------- a bias that scores share


class Spread(NamedTuple):
    """Who shares a tile of the bias."""

    batches: Any  # so many batches,
    heads: Any  # and so many heads of each
    own_heads: Any  # heads of the bias itself


@triton.jit
def _take_scores(x, i, first, own, spread, problem, static: tl.constexpr, CAREFUL: tl.constexpr):
    """(M, N) dlogit of queries i (M,) and keys [first, first + N), summed over those who share the
    tile, from head ``own`` on."""
    N: tl.constexpr = static.block_n
    j = first + tl.arange(0, N)[None, :]
    total = tl.zeros((i.shape[0], N), tl.float32)
    for n in range(0, spread.batches * spread.heads):
        head = own.head + n % spread.heads
        at = Head(own.batch + n // spread.heads, head, head // problem.sizes.group)
        fixed, _ = _start_queries(x, i, at, problem, static, CAREFUL)
        queries, dout, delta, low, high = fixed
        numbers = (delta[:, None], low[:, None], high[:, None])
        keys = load_keys(x.k, at, first, problem, static, True)
        values = load_values(x.v, at, first, problem, static, True)
        s = tl.dot(queries, tl.trans(keys), input_precision=static.precision)
        dp = tl.dot(dout, tl.trans(values), input_precision=static.precision)
        keep = s
        if problem.dropout is not None:
            keep = kept(problem.dropout, at, i[:, None], first, N)
        _, dlogit, _, _ = differentiate(
            s, dp, numbers, keep, at, i[:, None], j, problem, static, True, CAREFUL
        )
        total += dlogit
    return total


@triton.jit(do_not_specialize=["sizes", "mask", "dropout", "spread"])
def attention_dbias_kernel(x, dbias, sizes, mask, score, dropout, spread, static: tl.constexpr):
    """A program: a tile of a bias that batches or heads share, through all of them."""
    problem = Problem(sizes, mask, score, dropout)
    M: tl.constexpr = static.block_m
    N: tl.constexpr = static.block_n
    tile, number = tile_and_head(sizes.q_len, M)
    key_tiles = tl.cdiv(sizes.k_len, N)
    i_begin = tile * M
    first = number % key_tiles * N
    number = number // key_tiles
    own = Head(number // spread.own_heads, number % spread.own_heads, 0)
    begin, end = any_keys(i_begin, tl.minimum(i_begin + M, sizes.q_len), sizes.k_len, mask)
    if (first < end) & (first + N > begin):
        i = i_begin + tl.arange(0, M)
        total = _take_scores(x, i, first, own, spread, problem, static, False)
        if unsound(total):
            total = _take_scores(x, i, first, own, spread, problem, static, True)
        j = first + tl.arange(0, N)[None, :]
        store_scores(dbias, total, own, i[:, None], j, sizes)


@triton.jit(do_not_specialize=["sizes", "mask", "dropout"])
def attention_key_sums_kernel(x, key_sums, sizes, mask, score, dropout, static: tl.constexpr):
    """A program: the sums of dlogit of a tile of keys of a head, over its queries."""
    problem = Problem(sizes, mask, score, dropout)
    M: tl.constexpr = static.block_m
    N: tl.constexpr = static.block_n
    tile, number = tile_and_head(sizes.k_len, N)
    first = tile * N
    own = Head(number // sizes.heads, number % sizes.heads, 0)
    begin, end = any_queries(first, tl.minimum(first + N, sizes.k_len), sizes.q_len, mask)
    sums = tl.zeros((N,), tl.float32)
    for start in range(begin // M * M, end, M):
        i = start + tl.arange(0, M)
        scores = _take_scores(x, i, first, own, Spread(1, 1, 1), problem, static, False)
        if unsound(scores):
            scores = _take_scores(x, i, first, own, Spread(1, 1, 1), problem, static, True)
        sums += tl.sum(scores, 0)
    j = first + tl.arange(0, N)
    tl.store(key_sums + number.to(tl.int64) * sizes.k_len + j, sums, mask=j < sizes.k_len)
