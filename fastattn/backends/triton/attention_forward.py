"""Attention forward: the online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).

A program takes a tile of queries through the keys they see: first those that only some of them see,
then, unmasked, those that all see, then the rest. It keeps the running maximum m and sum of each
row; where nothing else modifies the score, in the units of what the product gives: the exponent
takes the scale along, p = exp2(x * factor - m * factor).

That is a difference of rounded numbers, and 0 * nan is nan. Where logits are so large that it
matters, or where a result is not finite, the program takes its tile again, carefully: that costs
nothing where it is not needed, and leaves the common loop as short as it can be.

Where programs are too few for the device, the keys are split among several, whose maxima, sums and
accumulators a second kernel merges. Few queries (decode) are taken together with those of the other
heads that read the same keys: the rows of a tile are then (head, query) pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import AttentionCall, empty_output
from .attention_config import Config, attention_problem, forward_config, heads_together, key_splits
from .attention_tile import (
    Head,
    Problem,
    careful_dot,
    exp_factor,
    is_plain,
    kept,
    load_keys,
    load_rows,
    load_values,
    make_logits,
    problem_of,
    static_of,
    store_rows,
    tile_and_head,
    unsound,
)
from .kernel import (
    LOG2E,
    Launch,
    View,
    architecture,
    describe,
    next_power_of_two,
    processors,
)
from .mask import all_keys, any_keys
from .tuned import tuned

_LOG2E = tl.constexpr(LOG2E)
CAREFUL_ROWS = tl.constexpr(16)
GROUPED_QUERIES = 16  # of a head, at most, where the rows of a tile are of several heads


class Parts(NamedTuple):
    """What programs that share a row's keys leave to be merged, float32."""

    acc: Any  # (B, Hq, Sq, splits, Dv)
    max: Any  # (B, Hq, Sq, splits)
    sum: Any
    splits: Any


class Tensors(NamedTuple):
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    parts: Any
    split: Any  # which of the parts
    sinks: Any


class Order(NamedTuple):
    """Which tile a program takes: see ``tile_order``."""

    tiles: Any  # of a head
    heads: Any  # of all batches
    together: Any


@triton.jit
def tile_order(order):
    """(tile, head of all batches). Heads in groups whose keys stay in cache together; in a group
    the last tile of each head first, since under a causal mask it has the most keys."""
    program = tl.program_id(0)
    first = program // (order.tiles * order.together) * order.together
    rest = program - first * order.tiles
    heads = tl.minimum(order.heads - first, order.together)
    return order.tiles - 1 - rest // heads, first + rest % heads


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def walk_keys(
    state,
    queries,
    tensors,
    begin,
    end,
    at,
    i,
    problem,
    static: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Takes the keys [begin, end) into state: acc (M, Dv), m (M,) and total (M,)."""
    acc, m, total = state
    factor = exp_factor(problem.score, static)
    for start in tl.range(
        begin,
        end,
        static.block_n,
        num_stages=1 if CAREFUL else None,
        warp_specialize=static.specialize and not CAREFUL,
    ):
        start = tl.multiple_of(start, static.block_n)
        j = start + tl.arange(0, static.block_n)[None, :]
        keys = load_keys(tensors.k, at, start, problem, static, MASKED)  # (N, D)
        x = tl.dot(queries, tl.trans(keys), input_precision=static.precision)  # (M, N)
        x, _ = make_logits(x, at, i, j, problem, static.modified, MASKED)

        top = tl.maximum(m, tl.max(x, 1))
        # A row that has seen nothing yet is all -inf: any finite reference turns it into zeros.
        reference = tl.where(top == -float("inf"), 0.0, top)
        if CAREFUL or static.exact:
            p = tl.exp2((x - reference[:, None]) * factor)
            alpha = tl.exp2((m - reference) * factor)
        else:
            reference = reference * factor
            p = tl.exp2(x * factor - reference[:, None])
            alpha = tl.exp2(m * factor - reference)
        m = top
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if problem.dropout is not None:
            p = tl.where(kept(problem.dropout, at, i, start, static.block_n), p, 0.0)

        values = load_values(tensors.v, at, start, problem, static, MASKED)  # (N, Dv)
        if CAREFUL:
            acc = careful_dot(p, values, x != -float("inf"), acc, static.precision)
        else:
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision=static.precision)
    return acc, m, total


@triton.jit
def start_rows(ROWS: tl.constexpr, static: tl.constexpr):
    acc = tl.zeros((ROWS, static.dv), tl.float32)
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    return acc, m, total


@triton.jit
def whose(row, number, sizes, static: tl.constexpr):
    """(i, at): the queries and the heads that are rows ``row`` (M,) of the walked head."""
    if static.grouped:
        kv_heads = sizes.heads // sizes.group
        kv_head = number % kv_heads
        # Rows beyond the last have a query beyond the last.
        i = tl.where(row < sizes.group * sizes.q_len, row % sizes.q_len, sizes.q_len)
        head = kv_head * sizes.group + tl.minimum(row // sizes.q_len, sizes.group - 1)
        return i, Head(number // kv_heads, head, kv_head)
    else:
        head = number % sizes.heads
        return row, Head(number // sizes.heads, head, head // sizes.group)


@triton.jit
def as_column(at, static: tl.constexpr):
    """``at`` with its heads as (M, 1), if it has several."""
    if static.grouped:
        return Head(at.batch, at.head[:, None], at.kv_head)
    else:
        return at


@triton.jit
def finish_rows(state, x, at, i, doubt, problem, static: tl.constexpr):
    """Writes rows i (M,) whose keys are done. A sink is one more logit, and has no value. Rows in
    ``doubt``, if not None, are marked with NaN for lse."""
    acc, m, total = state
    q_len = problem.sizes.q_len
    row = (at.batch * problem.sizes.heads + at.head).to(tl.int64) * q_len + i
    if x.parts is not None:
        row = row * x.parts.splits + x.split
        tl.store(x.parts.max + row, m, mask=i < q_len)
        tl.store(x.parts.sum + row, total, mask=i < q_len)
        d = tl.arange(0, static.dv)[None, :]
        inside = (i < q_len)[:, None] & (d < static.v_dim)
        tl.store(x.parts.acc + row[:, None] * static.v_dim + d, acc, mask=inside)
    else:
        top = m if static.modified else m * problem.score.scale
        scale = tl.full(total.shape, 1.0, tl.float32)
        if x.sinks is not None:
            sink = tl.load(x.sinks + at.head).to(tl.float32)
            peak = tl.maximum(top, sink)
            reference = tl.where(peak == -float("inf"), 0.0, peak)
            scale = tl.exp2((top - reference) * _LOG2E)
            total = total * scale + tl.exp2((sink - reference) * _LOG2E)
            top = peak
        blind = total == 0
        total = tl.where(blind, 1.0, total)
        if problem.dropout is not None:
            scale = scale * problem.dropout.scale
        scale = tl.where(blind, 0.0, scale / total)
        column = as_column(at, static)
        store_rows(x.out, acc * scale[:, None], column, i[:, None], q_len, static.v_dim, static.dv)
        value = tl.where(blind, -float("inf"), top + tl.log(total))
        if doubt is not None:
            value = tl.where(doubt, float("nan"), value)
        tl.store(x.lse + row, value, mask=i < q_len)


@triton.jit
def doubtful(state, score, static: tl.constexpr):
    """(M,) the rows whose maxima or sums were not fit for the common loop; not so acc itself."""
    _, m, total = state
    large = (tl.abs(m) * exp_factor(score, static) > 2.0**24) & (m != -float("inf"))
    return large | (total - total != 0)


@triton.jit
def take_rows_again(x, row, number, begin, end, problem, static: tl.constexpr):
    """Rows ``row`` of the walked head from the start, carefully."""
    i, at = whose(row, number, problem.sizes, static)
    i2 = i[:, None]
    at2 = as_column(at, static)
    queries = load_rows(x.q, at2, i2, problem.sizes.q_len, static.head_dim, static.d)
    state = start_rows(row.shape[0], static)
    state = walk_keys(state, queries, x, begin, end, at2, i2, problem, static, True, True)
    finish_rows(state, x, at, i, None, problem, static)


@triton.jit(do_not_specialize=["sizes", "mask", "dropout", "order", "chunk"])
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    parts,
    sinks,
    sizes,
    mask,
    score,
    dropout,
    order,
    chunk,
    static: tl.constexpr,
):
    """A program: a tile of queries of a head, or of (head, query) pairs of a KV head, with all keys
    that they see, or with those in its chunk of keys."""
    problem = Problem(sizes, mask, score, dropout)
    M: tl.constexpr = static.block_m
    N: tl.constexpr = static.block_n
    tile, number = tile_order(order)
    i, at = whose(tile * M + tl.arange(0, M), number, sizes, static)
    if static.grouped:
        i_begin = 0
        i_end = sizes.q_len
    else:
        i_begin = tile * M
        i_end = tl.minimum(i_begin + M, sizes.q_len)

    begin, end = any_keys(i_begin, i_end, sizes.k_len, mask)
    all_begin, all_end = all_keys(i_begin, i_end, sizes.k_len, mask)
    split = tl.program_id(1)
    x = Tensors(q, k, v, out, lse, parts, split, sinks)
    if parts is not None:
        begin = tl.maximum(begin, split * chunk)
        end = tl.minimum(end, (split + 1) * chunk)
        all_end = tl.minimum(all_end, end)
    begin = begin // N * N
    all_begin = tl.maximum(tl.cdiv(all_begin, N) * N, begin)
    all_end = tl.maximum(all_end // N * N, all_begin)

    i2 = i[:, None]
    at2 = as_column(at, static)
    queries = load_rows(q, at2, i2, sizes.q_len, static.head_dim, static.d)  # (M, D)
    state = start_rows(M, static)
    if mask.left is not None:
        first_end = tl.minimum(all_begin, end)
        state = walk_keys(
            state, queries, x, begin, first_end, at2, i2, problem, static, True, False
        )
    state = walk_keys(state, queries, x, all_begin, all_end, at2, i2, problem, static, False, False)
    state = walk_keys(state, queries, x, all_end, end, at2, i2, problem, static, True, False)

    if unsound(state[0]) or tl.max(doubtful(state, score, static).to(tl.int32), 0) > 0:
        # A few rows at a time: the registers are those of the common case.
        for first in range(0, M, CAREFUL_ROWS):
            row = tile * M + first + tl.arange(0, CAREFUL_ROWS)
            take_rows_again(x, row, number, begin, end, problem, static)
    else:
        finish_rows(state, x, at, i, None, problem, static)


@triton.jit(do_not_specialize=["sizes", "mask", "dropout"])
def attention_merge_kernel(
    out, lse, parts, sinks, sizes, mask, score, dropout, static: tl.constexpr, SPLITS: tl.constexpr
):
    """A program: block_m rows of a head, each from its parts."""
    problem = Problem(sizes, mask, score, dropout)
    tile, number = tile_and_head(sizes.q_len, static.block_m)
    head = number % sizes.heads
    at = Head(number // sizes.heads, head, head // sizes.group)
    i = tile * static.block_m + tl.arange(0, static.block_m)
    r = (number.to(tl.int64) * sizes.q_len + i) * parts.splits  # (M,)
    inside = i < sizes.q_len

    split = tl.arange(0, SPLITS)[None, :]
    there = inside[:, None] & (split < parts.splits)
    m = tl.load(parts.max + r[:, None] + split, mask=there, other=-float("inf"))
    top = tl.max(m, 1)
    factor = exp_factor(score, static)
    reference = tl.where(top == -float("inf"), 0.0, top)
    d = tl.arange(0, static.dv)[None, :]
    columns = inside[:, None] & (d < static.v_dim)
    acc = tl.zeros((static.block_m, static.dv), tl.float32)
    total = tl.zeros((static.block_m,), tl.float32)
    for s in range(0, parts.splits):
        peak = tl.load(parts.max + r + s, mask=inside, other=-float("inf"))
        weight = tl.exp2((peak - reference) * factor)
        total += weight * tl.load(parts.sum + r + s, mask=inside, other=0.0)
        part = tl.load(parts.acc + (r + s)[:, None] * static.v_dim + d, mask=columns, other=0.0)
        acc += weight[:, None] * part
    finish_rows(
        (acc, top, total),
        Tensors(None, None, None, out, lse, None, 0, sinks),
        at,
        i,
        None,
        problem,
        static,
    )


# ------------------------------------------------------------------------------------------- host


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse), as ``Backend.attention_forward``."""
    out = empty_output(call.q, call.v.shape[3])
    lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
    for launch in forward_launches(call, out, lse, architecture(call.q.device)):
        launch.run()
    return out, lse


def forward_launches(
    call: AttentionCall, out: Tensor, lse: Tensor, arch: str, config: Config | None = None
) -> list[Launch]:
    """The kernels of one call; tensors may be on the meta device."""
    batch, heads, q_len, head_dim = call.q.shape
    v_dim = call.v.shape[3]
    if batch * heads * q_len == 0:
        return []
    problem = problem_of(call)
    sizes, score = problem.sizes, problem.score
    grouped = q_len <= GROUPED_QUERIES and sizes.group > 1
    rows = q_len * (sizes.group if grouped else 1)
    from . import attention_specialized as specialized  # which builds on this module

    special = not grouped and specialized.is_specializable(call, problem)
    if config is None:
        shape = (head_dim, v_dim, rows)
        plain = is_plain(call, problem)
        config = forward_config(arch, call.q.dtype, *shape, sizes.k_len, special, plain)
        name = attention_problem(call.q.dtype, *shape, special)
        config = tuned("attention_forward", name, call.q.device, config)
    if config.specialize and special:
        return specialized.specialized_launches(call, problem, out, lse, config)
    static = static_of(call, score, config, (call.k, call.v), grouped)
    k: Any = View.of(call.k)
    v: Any = View.of(call.v)
    if static.tma:
        k, v = (describe(x, static.block_n) for x in (call.k, call.v))
    tiles = -(-rows // config.block_m)
    walked_heads = batch * heads // (sizes.group if grouped else 1)
    splits, chunk = key_splits(
        tiles * walked_heads, sizes.k_len, config.block_n, processors(call.q.device)
    )
    parts = None
    if splits > 1:
        shape = (*call.q.shape[:3], splits)
        acc, peak, total = (
            torch.empty(size, dtype=torch.float32, device=call.q.device)
            for size in ((*shape, v_dim), shape, shape)
        )
        parts = Parts(acc, peak, total, splits)
    kv_bytes = sizes.k_len * (head_dim + v_dim) * call.q.element_size()
    sharing, even = 1 if grouped else sizes.group, problem.mask.right is None
    together = heads_together(walked_heads, kv_bytes, sharing, even)
    common = {"parts": parts, "sinks": call.sinks, **problem._asdict()}
    launches = [
        Launch(
            attention_forward_kernel,
            (tiles * walked_heads, splits),
            {
                "q": View.of(call.q),
                "k": k,
                "v": v,
                "out": View.of(out),
                "lse": lse,
                **common,
                "order": Order(tiles, walked_heads, together),
                "chunk": chunk,
            },
            {"static": static},
            config.num_warps,
            config.num_stages,
        )
    ]
    if parts is not None:
        merge_rows = min(16, next_power_of_two(q_len))
        static = static._replace(block_m=merge_rows, grouped=False)
        launches.append(
            Launch(
                attention_merge_kernel,
                (-(-q_len // merge_rows) * batch * heads,),
                {"out": View.of(out), "lse": lse, **common},
                {"static": static, "SPLITS": next_power_of_two(splits)},
            )
        )
    return launches
