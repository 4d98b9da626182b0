"""Attention forward with specialised warps: some fetch keys and values, some multiply.

For Hopper and datacenter Blackwell, which have a tensor memory accelerator to fetch with, and
products that run beside other work; and for calls that need nothing but a mask and sinks.

Triton's automatic specialisation (``tl.range(..., warp_specialize=True)``) asks much of a kernel on
Hopper: descriptors made by the kernel itself, of rank 2, for the queries too; one loop, so that the
mask is looked at in every tile; and no branch after it. So a row in doubt (attention_forward.py) is
marked, with NaN for its lse, and another kernel takes such rows again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..base import AttentionCall
from .attention_config import Config, heads_together
from .attention_forward import (
    CAREFUL_ROWS,
    Order,
    Tensors,
    doubtful,
    finish_rows,
    start_rows,
    take_rows_again,
    tile_order,
    walk_keys,
)
from .attention_tile import Head, Problem, is_plain, static_of, tile_and_head
from .kernel import Launch, View, describable
from .mask import any_keys

SCANNED_ROWS = 256


@triton.jit
def _describe(
    x, at_batch, at_head, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Tiles (ROWS, COLUMNS) of one head."""
    base = x.ptr + at_batch.to(tl.int64) * x.b + at_head.to(tl.int64) * x.h
    step = tl.cast(x.s, tl.int64)
    return tl.make_tensor_descriptor(base, [length, WIDTH], [step, 1], [ROWS, COLUMNS])


@triton.jit(do_not_specialize=["sizes", "mask", "order"])
def attention_specialized_kernel(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    sizes,
    mask,
    score,
    order,
    static: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A program: a tile of queries of a head, with all keys that they see."""
    problem = Problem(sizes, mask, score, None)
    M: tl.constexpr = static.block_m
    N: tl.constexpr = static.block_n
    tile, number = tile_order(order)
    head = number % sizes.heads
    at = Head(number // sizes.heads, head, head // sizes.group)
    i_begin = tile * M
    i = i_begin + tl.arange(0, M)
    begin, end = any_keys(i_begin, tl.minimum(i_begin + M, sizes.q_len), sizes.k_len, mask)

    q_tiles = _describe(q, at.batch, head, sizes.q_len, M, static.head_dim, static.d)
    k_tiles = _describe(k, at.batch, at.kv_head, sizes.k_len, N, static.head_dim, static.d)
    v_tiles = _describe(v, at.batch, at.kv_head, sizes.k_len, N, static.v_dim, static.dv)
    x = Tensors(q, k_tiles, v_tiles, out, lse, None, 0, sinks)
    queries = q_tiles.load([i_begin, 0])  # (M, D)
    state = walk_keys(
        start_rows(M, static), queries, x, begin // N * N, end, at, i[:, None],
        problem, static, MASKED, False,
    )  # fmt: skip
    sums = tl.sum(state[0], 1)
    doubt = doubtful(state, score, static) | (sums - sums != 0)
    finish_rows(state, x, at, i, doubt, problem, static)


@triton.jit(do_not_specialize=["sizes", "mask"])
def attention_again_kernel(
    q, k, v, out, lse, sinks, sizes, mask, score, static: tl.constexpr, ROWS: tl.constexpr
):
    """A program: the marked among ROWS rows of a head, carefully."""
    problem = Problem(sizes, mask, score, None)
    tile, number = tile_and_head(sizes.q_len, ROWS)
    x = Tensors(q, k, v, out, lse, None, 0, sinks)
    first = tile * ROWS
    if _marked(lse, number, first, sizes.q_len, ROWS):
        for begin in range(first, tl.minimum(first + ROWS, sizes.q_len), CAREFUL_ROWS):
            if _marked(lse, number, begin, sizes.q_len, CAREFUL_ROWS):
                row = begin + tl.arange(0, CAREFUL_ROWS)
                i_end = tl.minimum(begin + CAREFUL_ROWS, sizes.q_len)
                seen, end = any_keys(begin, i_end, sizes.k_len, mask)
                seen = seen // static.block_n * static.block_n
                take_rows_again(x, row, number, seen, end, problem, static)


@triton.jit
def _marked(lse, number, first, q_len, ROWS: tl.constexpr):
    i = first + tl.arange(0, ROWS)
    value = tl.load(lse + number.to(tl.int64) * q_len + i, mask=i < q_len, other=0.0)
    return tl.max((value != value).to(tl.int32), 0) > 0


# ------------------------------------------------------------------------------------------- host


def is_specializable(call: AttentionCall, problem: Problem) -> bool:
    """Whether specialised warps can serve the call. The kernel describes tensors by the strides of
    their rows, and the stride of a single row may be any number."""
    several = min(problem.sizes.q_len, problem.sizes.k_len) > 1
    return several and is_plain(call, problem) and all(map(describable, (call.q, call.k, call.v)))


def specialized_launches(
    call: AttentionCall, problem: Problem, out: Tensor, lse: Tensor, config: Config
) -> list[Launch]:
    """The kernels of one call; tensors may be on the meta device."""
    batch, heads, q_len, _ = call.q.shape
    sizes, mask = problem.sizes, problem.mask
    static = static_of(call, problem.score, config)
    kv_bytes = sizes.k_len * (call.k.shape[3] + call.v.shape[3]) * call.k.element_size()
    even = mask.right is None
    tiles = -(-q_len // config.block_m)
    together = heads_together(batch * heads, kv_bytes, sizes.group, even)
    order = Order(tiles, batch * heads, together)
    arguments = {
        "q": View.of(call.q),
        "k": View.of(call.k),
        "v": View.of(call.v),
        "out": View.of(out),
        "lse": lse,
        "sinks": call.sinks,
        "sizes": sizes,
        "mask": mask,
        "score": problem.score,
    }
    masked = not (even and mask.left is None and sizes.k_len % config.block_n == 0)
    return [
        Launch(
            attention_specialized_kernel,
            (tiles * batch * heads,),
            {**arguments, "order": order},
            {"static": static._replace(tma=2, specialize=True), "MASKED": masked},
            config.num_warps,
            config.num_stages,
            describes=True,
        ),
        Launch(
            attention_again_kernel,
            (-(-q_len // SCANNED_ROWS) * batch * heads,),
            arguments,
            {"static": static._replace(block_n=64), "ROWS": SCANNED_ROWS},
            num_warps=4,
            num_stages=1,
        ),
    ]
