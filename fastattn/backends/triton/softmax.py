"""Softmax and log-softmax of scale * x + mask in Triton, forward and backward.

A tile is (L, W): L lines of W numbers that are summed over. Lines are rows, whose numbers are
adjacent, or, where the summed dimension is not the last, columns that are adjacent to one another.
Lines that do not fit into registers are walked in blocks of W, twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import SoftmaxCall
from ..rows import columns_of
from .kernel import LOG2E, Launch, architecture, cdiv
from .row_config import RowConfig, row_problem, softmax_config
from .rows import Lines, Sizes, contiguous_like, launch_of, row_address
from .tuned import tuned

_LOG2E = tl.constexpr(LOG2E)


# ---------------------------------------------------------------------------------------- tiles


@triton.jit
def lines_of(sizes, inner, L: tl.constexpr):
    """(row (L,) int64, column (L,), which of the L lines exist): one row's columns, or, where there
    is one column (inner is None), L rows."""
    program = tl.program_id(0)
    line = tl.arange(0, L)
    if inner is None:
        row = tl.full((L,), program, tl.int64) * L + line
        column = tl.zeros((L,), tl.int32)
        exists = row < sizes.rows
    else:
        blocks = tl.cdiv(inner, L)
        row = tl.full((L,), program // blocks, tl.int64)
        column = program % blocks * L + line
        exists = column < inner
    return row, column, exists


@triton.jit
def line_address(x, row, column, sizes):
    """The addresses (L, 1) of the first numbers of lines."""
    return (row_address(x, row, sizes) + column * x.across)[:, None]


@triton.jit
def load_scores(x, mask, row, column, sizes, scale, position, inside):
    """(L, W) float32: scale x + mask, -inf outside and where a bool mask is False."""
    along = position.to(tl.int64)
    s = tl.load(line_address(x, row, column, sizes) + along * x.along, mask=inside, other=0.0)
    s = s.to(tl.float32) * scale
    kept = inside
    if mask is not None:
        at_mask = line_address(mask, row, column, sizes)
        m = tl.load(at_mask + along * mask.along, mask=inside, other=0)
        if mask.ptr.dtype.element_ty == tl.int1:
            kept = kept & (m != 0)
        else:
            s += m.to(tl.float32)
    return tl.where(kept, s, float("-inf"))


@triton.jit
def base_of(top, mask):
    """What to subtract from the scores: their maximum. Where a mask leaves nothing, exp(-inf - 0)
    is a sound 0; without one, -inf - -inf is the NaN that torch has."""
    if mask is not None:
        top = tl.where(top == float("-inf"), 0.0, top)
    return top


@triton.jit
def store_softmax(y, at_y, s, base, total, position, inside, mask, LOG: tl.constexpr):
    """exp(s - base) / total, or its logarithm; nothing to keep: 0, or -inf."""
    if LOG:
        out = (s - base[:, None]) - tl.log(total)[:, None]
        nothing = float("-inf")
    else:
        out = tl.exp2((s - base[:, None]) * _LOG2E) / total[:, None]
        nothing = 0.0
    if mask is not None:
        out = tl.where(total[:, None] == 0.0, nothing, out)
    at = at_y + position.to(tl.int64) * y.along
    tl.store(at, out.to(y.ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_term(v, up, LOG: tl.constexpr):
    """What is summed over a line: y dy, or for the logarithm dy."""
    return up if LOG else v * up


@triton.jit
def store_gradient(dx, at_dx, v, up, total, scale, position, inside, LOG: tl.constexpr):
    """scale y (dy - total); for the logarithm scale (dy - exp(y) total), 0 where y is -inf."""
    if LOG:
        out = scale * (up - tl.exp2(v * _LOG2E) * total[:, None])
        out = tl.where(v == float("-inf"), 0.0, out)
    else:
        out = scale * (v * (up - total[:, None]))
    at = at_dx + position.to(tl.int64) * dx.along
    tl.store(at, out.to(dx.ptr.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------- kernels


@triton.jit
def softmax_forward_kernel(
    x, mask, y, sizes, width, inner, scale, LOG: tl.constexpr, L: tl.constexpr, W: tl.constexpr
):
    """Whole lines in registers: each is read once."""
    row, column, exists = lines_of(sizes, inner, L)
    position = tl.arange(0, W)[None, :]
    inside = exists[:, None] & (position < width)
    s = load_scores(x, mask, row, column, sizes, scale, position, inside)
    base = base_of(tl.max(s, axis=1), mask)
    total = tl.sum(tl.exp2((s - base[:, None]) * _LOG2E), axis=1)
    at_y = line_address(y, row, column, sizes)
    store_softmax(y, at_y, s, base, total, position, inside, mask, LOG)


@triton.jit
def softmax_forward_looped_kernel(
    x, mask, y, sizes, width, inner, scale, LOG: tl.constexpr, L: tl.constexpr, W: tl.constexpr
):
    """Lines in blocks, with the running maximum and sum of the online softmax (Milakov and
    Gimelshein, arXiv:1805.02867), and once more for the result."""
    row, column, exists = lines_of(sizes, inner, L)
    at_y = line_address(y, row, column, sizes)
    top = tl.full((L,), float("-inf"), tl.float32)
    total = tl.zeros((L,), tl.float32)
    for begin in range(0, width, W):
        position = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (position < width)
        s = load_scores(x, mask, row, column, sizes, scale, position, inside)
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a block may have nothing to keep
        total *= tl.exp2((top - base) * _LOG2E)
        total += tl.sum(tl.exp2((s - base[:, None]) * _LOG2E), axis=1)
        top = higher
    base = base_of(top, mask)
    for begin in range(0, width, W):
        position = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (position < width)
        s = load_scores(x, mask, row, column, sizes, scale, position, inside)
        store_softmax(y, at_y, s, base, total, position, inside, mask, LOG)


@triton.jit
def softmax_backward_kernel(
    y, dy, dx, sizes, width, inner, scale, LOG: tl.constexpr, L: tl.constexpr, W: tl.constexpr
):
    """Whole lines in registers: each is read once."""
    row, column, exists = lines_of(sizes, inner, L)
    position = tl.arange(0, W)[None, :]
    inside = exists[:, None] & (position < width)
    along = position.to(tl.int64)
    at_y = line_address(y, row, column, sizes) + along * y.along
    at_dy = line_address(dy, row, column, sizes) + along * dy.along
    v = tl.load(at_y, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at_dy, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(dot_term(v, up, LOG), axis=1)
    at_dx = line_address(dx, row, column, sizes)
    store_gradient(dx, at_dx, v, up, total, scale, position, inside, LOG)


@triton.jit
def softmax_backward_looped_kernel(
    y, dy, dx, sizes, width, inner, scale, LOG: tl.constexpr, L: tl.constexpr, W: tl.constexpr
):
    """Lines in blocks: one walk for the sum, one for the result."""
    row, column, exists = lines_of(sizes, inner, L)
    at_y = line_address(y, row, column, sizes)
    at_dy = line_address(dy, row, column, sizes)
    at_dx = line_address(dx, row, column, sizes)
    terms = tl.zeros((L, W), tl.float32)
    for begin in range(0, width, W):
        position = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (position < width)
        along = position.to(tl.int64)
        v = tl.load(at_y + along * y.along, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at_dy + along * dy.along, mask=inside, other=0.0).to(tl.float32)
        terms += dot_term(v, up, LOG)
    total = tl.sum(terms, axis=1)
    for begin in range(0, width, W):
        position = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (position < width)
        along = position.to(tl.int64)
        v = tl.load(at_y + along * y.along, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at_dy + along * dy.along, mask=inside, other=0.0).to(tl.float32)
        store_gradient(dx, at_dx, v, up, total, scale, position, inside, LOG)


# --------------------------------------------------------------------------------------- launch


def _config(x: Tensor, sizes: tuple[int, ...], arch: str, backward: bool = False) -> RowConfig:
    config = softmax_config(arch, sizes, backward)
    problem = row_problem(x.dtype, config)
    if sizes[-1] > 1:
        problem = f"{problem}, {config.block_rows} columns"
    return tuned("softmax_backward" if backward else "softmax_forward", problem, x.device, config)


def _launch(
    kernels: tuple, config: RowConfig, sizes: tuple[int, ...], given: dict, log: bool
) -> Launch:
    """Of the second of the kernels, where lines are looped."""
    n0, n1, n2, width, inner = sizes
    given |= {"sizes": Sizes.of(sizes), "width": width, "inner": None if inner == 1 else inner}
    rows = n0 * n1 * n2
    programs = rows * cdiv(inner, config.block_rows)
    if inner == 1:
        programs = cdiv(rows, config.block_rows)
    tile = {"LOG": log, "L": config.block_rows, "W": config.block_width}
    return launch_of(kernels[config.looped], (programs,), given, tile, config.num_warps)


def forward_launch(
    call: SoftmaxCall, y: Tensor, arch: str, config: RowConfig | None = None
) -> Launch:
    sizes, (x, *masks), strides, mask_inner = columns_of(call.dim, (call.x,), call.mask)
    config = config or _config(x, sizes, arch)
    given = {
        "x": Lines.of(x, strides[0], 1),
        "mask": Lines.of(masks[0], strides[1], mask_inner) if masks else None,
        "y": Lines.contiguous(y, sizes),
        "scale": call.scale,
    }
    kernels = softmax_forward_kernel, softmax_forward_looped_kernel
    return _launch(kernels, config, sizes, given, call.log)


def softmax_forward(call: SoftmaxCall) -> Tensor:
    y = contiguous_like(call.x, call.dtype)
    if y.numel():
        forward_launch(call, y, architecture(y.device)).run()
    return y


def backward_launch(
    y: Tensor,
    dy: Tensor,
    dx: Tensor,
    dim: int,
    scale: float,
    log: bool,
    arch: str,
    config: RowConfig | None = None,
) -> Launch:
    sizes, (y, dy), strides, _ = columns_of(dim, (y, dy))
    config = config or _config(y, sizes, arch, backward=True)
    given = {
        "y": Lines.of(y, strides[0], 1),
        "dy": Lines.of(dy, strides[1], 1),
        "dx": Lines.contiguous(dx, sizes),
        "scale": scale,
    }
    kernels = softmax_backward_kernel, softmax_backward_looped_kernel
    return _launch(kernels, config, sizes, given, log)


def softmax_backward(
    y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
) -> Tensor:
    dx = contiguous_like(y, x_dtype)
    if y.numel():
        backward_launch(y, dy, dx, dim, scale, log, architecture(y.device)).run()
    return dx
