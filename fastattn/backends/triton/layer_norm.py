"""Layer norm and RMS norm of residual + dropout(x) in Triton, forward and backward.

A tile is (R, W): R whole rows where W numbers fit into registers, else rows in blocks of W.
Statistics are float32, of the numbers less the row's first: a constant row has the variance 0 and
its mean exactly, and a mean of 1e4 costs no digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import LayerNormCall, Needs
from ..rows import rows_of
from .kernel import Launch, architecture, cdiv, processors
from .philox import philox
from .row_config import (
    RowConfig,
    column_tile,
    layer_norm_backward_config,
    layer_norm_config,
    row_problem,
)
from .rows import Dropout, Rows, Sizes, contiguous_like, launch_of, row_address
from .tuned import tuned

# ---------------------------------------------------------------------------------------- tiles


@triton.jit
def row_dropout(x, dropout, row, first, W: tl.constexpr):
    """x (R, W) of the columns from ``first`` on, a multiple of 4, after dropout.

    Word j & 3 of the counter (j / 4, row, row >> 32, 0) decides element j.
    """
    group = (first // 4 + tl.arange(0, W // 4))[None, :]
    low = (row & 0xFFFFFFFF)[:, None]
    high = (row >> 32)[:, None]
    zero = tl.zeros((row.shape[0], W // 4), tl.int32)
    w0, w1, w2, w3 = philox(tl.load(dropout.seed), group + zero, low, high, zero)
    # (R, W / 4, 2, 2), of which the last two in order are w0 w1 w2 w3
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(x.shape)
    return tl.where(words >= dropout.threshold, x * dropout.scale, 0.0)


@triton.jit
def load_source(
    x, residual, new_residual, dropout, row, begin, column, inside, sizes, width, W: tl.constexpr
):
    """(R, W) float32 of the columns from ``begin`` on: what is normalised, 0 outside. A sum is
    rounded as it is stored: that is what the backward will see."""
    at_x = row_address(x, row, sizes)[:, None] + column
    h = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        if dropout is not None:
            h = row_dropout(h, dropout, row, begin, W)
        at_residual = row_address(residual, row, sizes)[:, None] + column
        h += tl.load(at_residual, mask=inside, other=0.0).to(tl.float32)
        stored = h.to(new_residual.dtype.element_ty)
        tl.store(new_residual + row[:, None] * width + column, stored, mask=inside)
        h = tl.where(inside, stored.to(tl.float32), 0.0)
    return h


@triton.jit
def first_of(x, residual, new_residual, dropout, row, exists, sizes, width):
    """The first number (R,) of what is normalised."""
    column = tl.arange(0, 16)[None, :]
    inside = exists[:, None] & (column < width)
    h = load_source(x, residual, new_residual, dropout, row, 0, column, inside, sizes, width, 16)
    return tl.sum(tl.where(column == 0, h, 0.0), axis=1)


@triton.jit
def store_normalized(y, d, mean, rstd, weight, bias, column, inside, width):
    """y = (d - mean) rstd weight + bias, with mean and rstd (R,)."""
    out = (d - mean[:, None]) * rstd[:, None]
    if weight is not None:
        out *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + column, out.to(y.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------- forward


@triton.jit
def layer_norm_forward_kernel(
    x, residual, new_residual, dropout, weight, bias, y, mean, rstd, sizes, width, eps,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: each is read once."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # (R,)
    column = tl.arange(0, W)[None, :]  # (1, W)
    exists = row < sizes.rows
    inside = exists[:, None] & (column < width)
    h = load_source(x, residual, new_residual, dropout, row, 0, column, inside, sizes, width, W)
    if mean is None:
        centre = tl.zeros((R,), tl.float32)
        variance = tl.sum(h * h, axis=1) / width
    else:
        first = tl.sum(tl.where(column == 0, h, 0.0), axis=1)
        h = tl.where(inside, h - first[:, None], 0.0)
        centre = tl.sum(h, axis=1) / width
        d = tl.where(inside, h - centre[:, None], 0.0)
        variance = tl.sum(d * d, axis=1) / width
        tl.store(mean + row, first + centre, mask=exists)
    scale = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd + row, scale, mask=exists)
    store_normalized(
        y + row[:, None] * width, h, centre, scale, weight, bias, column, inside, width
    )


@triton.jit
def layer_norm_forward_looped_kernel(
    x, residual, new_residual, dropout, weight, bias, y, mean, rstd, sizes, width, eps,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rows in blocks, each read twice: for the moments, then for the result."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    exists = row < sizes.rows

    first = tl.zeros((R,), tl.float32)
    if mean is not None:
        first = first_of(x, residual, new_residual, dropout, row, exists, sizes, width)

    # Moments of the blocks, joined one by one (Chan et al., 1979).
    centre = tl.zeros((R,), tl.float32)
    squares = tl.zeros((R,), tl.float32)
    for begin in range(0, width, W):
        column = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (column < width)
        h = load_source(
            x, residual, new_residual, dropout, row, begin, column, inside, sizes, width, W
        )
        if mean is None:
            squares += tl.sum(h * h, axis=1)
        else:
            count = tl.minimum(width - begin, W)
            h = tl.where(inside, h - first[:, None], 0.0)
            block_centre = tl.sum(h, axis=1) / count
            d = tl.where(inside, h - block_centre[:, None], 0.0)
            step = block_centre - centre
            share = count.to(tl.float32) / (begin + count)
            squares += tl.sum(d * d, axis=1) + step * step * begin * share
            centre += step * share
    if mean is not None:
        tl.store(mean + row, first + centre, mask=exists)
    scale = 1.0 / tl.sqrt_rn(squares / width + eps)
    tl.store(rstd + row, scale, mask=exists)

    source = row_address(x, row, sizes)[:, None]
    if residual is not None:
        tl.debug_barrier()  # other threads may have written what this one reads
        source = new_residual + row[:, None] * width
    for begin in range(0, width, W):
        column = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (column < width)
        h = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        store_normalized(
            y + row[:, None] * width,
            h - first[:, None],
            centre,
            scale,
            weight,
            bias,
            column,
            inside,
            width,
        )


def forward_launch(
    call: LayerNormCall,
    outputs: tuple[Tensor | None, ...],
    arch: str,
    config: RowConfig | None = None,
) -> Launch:
    y, new_residual, mean, rstd = outputs
    sizes, (x, residual), strides = rows_of(call.width, call.x, call.residual)
    assert rstd is not None
    if config is None:
        config = layer_norm_config(arch, x.dtype, call.width, rstd.numel())
        problem = row_problem(x.dtype, config)
        config = tuned("layer_norm_forward", problem, x.device, config)
    kernel = layer_norm_forward_looped_kernel if config.looped else layer_norm_forward_kernel
    given = {
        "x": Rows.of(x, strides[0]), "residual": Rows.of(residual, strides[1]),
        "new_residual": new_residual, "dropout": Dropout.of(call.dropout_p, call.seed),
        "weight": _flat(call.weight), "bias": _flat(call.bias),
        "y": y, "mean": mean, "rstd": rstd,
        "sizes": Sizes.of(sizes), "width": call.width, "eps": call.eps,
    }  # fmt: skip
    tile = {"R": config.block_rows, "W": config.block_width}
    grid = (cdiv(rstd.numel(), config.block_rows),)
    return launch_of(kernel, grid, given, tile, config.num_warps)


def layer_norm_forward(
    call: LayerNormCall,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    x, width = call.x, call.width
    rows = x.numel() // width if width else 0
    y = contiguous_like(x)
    new_residual = None if call.residual is None else contiguous_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    mean = None if call.rms else torch.empty_like(rstd)
    if rows:
        forward_launch(call, (y, new_residual, mean, rstd), architecture(x.device)).run()
    return y, new_residual, mean, rstd


# ------------------------------------------------------------------------------------- backward


@triton.jit
def through_norm(g, x_hat, mean_g, mean_gx, rstd):
    """dh of one tile: rstd (g - mean(g) - x_hat mean(g x_hat)), for RMS without mean(g)."""
    return (g - mean_g[:, None] - x_hat * mean_gx[:, None]) * rstd[:, None]


@triton.jit
def store_gradients(
    dh, dnew_residual, dresidual, dx, dropout, row, begin, column, inside, sizes, width,
    W: tl.constexpr,
):  # fmt: skip
    """dresidual = dh + dnew_residual and dx = dropout of it, whichever are asked for."""
    at = row[:, None] * width + column
    if dnew_residual is not None:
        at_new = row_address(dnew_residual, row, sizes)[:, None] + column
        dh += tl.load(at_new, mask=inside, other=0.0).to(tl.float32)
    if dresidual is not None:
        tl.store(dresidual + at, dh.to(dresidual.dtype.element_ty), mask=inside)
    if dx is not None:
        if dropout is not None:
            dh = row_dropout(dh, dropout, row, begin, W)
        tl.store(dx + at, dh.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def load_x_hat(x, row, exists, column, inside, mean, rstd, sizes):
    """(x_hat (R, W), 0 outside, and rstd (R,))."""
    h = tl.load(row_address(x, row, sizes)[:, None] + column, mask=inside, other=0.0)
    scale = tl.load(rstd + row, mask=exists, other=0.0)
    d = h.to(tl.float32)
    if mean is not None:
        d -= tl.load(mean + row, mask=exists, other=0.0)[:, None]
    return tl.where(inside, d * scale[:, None], 0.0), scale


@triton.jit
def layer_norm_backward_kernel(
    x, dy, dnew_residual, dropout, weight, mean, rstd,
    dx, dresidual, dweights, dbiases, sizes, width,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers. A program takes every num_programs-th tile of rows, and leaves its
    sums of dweight and dbias as a row of dweights and dbiases (programs, width), float32."""
    column = tl.arange(0, W)[None, :]
    in_row = column < width
    w = tl.full((1, W), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    dw = tl.zeros((R, W), tl.float32)
    db = tl.zeros((R, W), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(sizes.rows, R), tl.num_programs(0)):
        row = tl.full((R,), tile, tl.int64) * R + tl.arange(0, R)
        exists = row < sizes.rows
        inside = exists[:, None] & in_row
        x_hat, scale = load_x_hat(x, row, exists, column, inside, mean, rstd, sizes)
        at_dy = row_address(dy, row, sizes)[:, None]
        up = tl.load(at_dy + column, mask=inside, other=0.0).to(tl.float32)
        if dweights is not None:
            dw += up * x_hat
        if dbiases is not None:
            db += up
        if dx is not None or dresidual is not None:
            g = up * w
            mean_gx = tl.sum(g * x_hat, axis=1) / width
            mean_g = tl.zeros((R,), tl.float32)
            if mean is not None:
                mean_g = tl.sum(g, axis=1) / width
            store_gradients(
                through_norm(g, x_hat, mean_g, mean_gx, scale),
                dnew_residual,
                dresidual,
                dx,
                dropout,
                row,
                0,
                column,
                inside,
                sizes,
                width,
                W,
            )
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, W)
    if dweights is not None:
        tl.store(dweights + at, tl.sum(dw, axis=0), mask=tl.arange(0, W) < width)
    if dbiases is not None:
        tl.store(dbiases + at, tl.sum(db, axis=0), mask=tl.arange(0, W) < width)


@triton.jit
def layer_norm_backward_looped_kernel(
    x, dy, dnew_residual, dropout, weight, mean, rstd, dx, dresidual, sizes, width,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of rows in blocks: one walk for the two means, one for the result."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    exists = row < sizes.rows
    at_dy = row_address(dy, row, sizes)[:, None]
    mean_g = tl.zeros((R,), tl.float32)
    mean_gx = tl.zeros((R,), tl.float32)
    for begin in range(0, width, W):
        column = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (column < width)
        x_hat, _ = load_x_hat(x, row, exists, column, inside, mean, rstd, sizes)
        g = tl.load(at_dy + column, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        mean_gx += tl.sum(g * x_hat, axis=1) / width
        if mean is not None:
            mean_g += tl.sum(g, axis=1) / width
    for begin in range(0, width, W):
        column = begin + tl.arange(0, W)[None, :]
        inside = exists[:, None] & (column < width)
        x_hat, scale = load_x_hat(x, row, exists, column, inside, mean, rstd, sizes)
        g = tl.load(at_dy + column, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        store_gradients(
            through_norm(g, x_hat, mean_g, mean_gx, scale),
            dnew_residual,
            dresidual,
            dx,
            dropout,
            row,
            begin,
            column,
            inside,
            sizes,
            width,
            W,
        )


@triton.jit
def layer_norm_weights_kernel(
    x, dy, mean, rstd, dweights, dbiases, sizes, width, R: tl.constexpr, W: tl.constexpr
):
    """Sums of dweight and dbias for W columns: program (c, p) takes every num_programs-th tile of
    rows, and leaves them in row p of dweights and dbiases (programs, width), float32."""
    column = tl.program_id(0) * W + tl.arange(0, W)[None, :]
    dw = tl.zeros((R, W), tl.float32)
    db = tl.zeros((R, W), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(sizes.rows, R), tl.num_programs(1)):
        row = tl.full((R,), tile, tl.int64) * R + tl.arange(0, R)
        exists = row < sizes.rows
        inside = exists[:, None] & (column < width)
        at_dy = row_address(dy, row, sizes)[:, None]
        up = tl.load(at_dy + column, mask=inside, other=0.0).to(tl.float32)
        if dweights is not None:
            x_hat, _ = load_x_hat(x, row, exists, column, inside, mean, rstd, sizes)
            dw += up * x_hat
        if dbiases is not None:
            db += up
    out = tl.program_id(0) * W + tl.arange(0, W)
    at = tl.program_id(1).to(tl.int64) * width + out
    if dweights is not None:
        tl.store(dweights + at, tl.sum(dw, axis=0), mask=out < width)
    if dbiases is not None:
        tl.store(dbiases + at, tl.sum(db, axis=0), mask=out < width)


@triton.jit
def sum_programs_kernel(
    dweights, dbiases, dweight, dbias, programs, width, P: tl.constexpr, W: tl.constexpr
):
    """dweight and dbias (width,) of the programs' sums (programs, width), in a fixed order."""
    column = tl.program_id(0) * W + tl.arange(0, W)
    if dweights is not None:
        total = column_sums(dweights, column, programs, width, P, W)
        tl.store(dweight + column, total.to(dweight.dtype.element_ty), mask=column < width)
    if dbiases is not None:
        total = column_sums(dbiases, column, programs, width, P, W)
        tl.store(dbias + column, total.to(dbias.dtype.element_ty), mask=column < width)


@triton.jit
def column_sums(x, column, programs, width, P: tl.constexpr, W: tl.constexpr):
    total = tl.zeros((P, W), tl.float32)
    for begin in range(0, programs, P):
        program = (begin + tl.arange(0, P))[:, None]
        at = x + program.to(tl.int64) * width + column[None, :]
        inside = (program < programs) & (column[None, :] < width)
        total += tl.load(at, mask=inside, other=0.0)
    return tl.sum(total, axis=0)


def backward_launches(
    call: LayerNormCall,
    source: Tensor,
    statistics: tuple[Tensor | None, Tensor],
    incoming: tuple[Tensor, Tensor | None],
    grads: tuple[Tensor | None, ...],
    arch: str,
    config: RowConfig | None = None,
) -> list[Launch]:
    """Rows in registers: one launch for everything; longer ones: one for dx and dresidual, one for
    the weights. Then one that sums what each program has of dweight and dbias."""
    width, (mean, rstd), (dx, dresidual, dweight, dbias) = call.width, statistics, grads
    sizes, held, strides = rows_of(width, source, *incoming)
    x, dy, dnew_residual = map(Rows.of, held, strides)
    rows, machine = rstd.numel(), processors(source.device)
    if config is None:
        config = layer_norm_backward_config(arch, width, rows)
        problem = row_problem(source.dtype, config)
        config = tuned("layer_norm_backward", problem, source.device, config)
    tiles = cdiv(rows, config.block_rows)
    if config.looped:
        weights_tile = dict(zip("RW", column_tile(width, machine, 512), strict=True))
        blocks = cdiv(width, weights_tile["W"])
        programs = min(cdiv(rows, weights_tile["R"]), cdiv(4 * machine, blocks))
    else:
        programs = min(tiles, machine * max(1, 16 // config.num_warps))

    def partials(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else rstd.new_empty((programs, width))

    given = {
        "x": x, "dy": dy, "dnew_residual": dnew_residual,
        "dropout": Dropout.of(call.dropout_p, call.seed), "weight": _flat(call.weight),
        "mean": mean, "rstd": rstd, "dx": dx, "dresidual": dresidual,
        "dweights": partials(dweight), "dbiases": partials(dbias), "dweight": dweight,
        "dbias": dbias, "sizes": Sizes.of(sizes), "width": width, "programs": programs,
    }  # fmt: skip
    tile = {"R": config.block_rows, "W": config.block_width}
    wants_rows = not (dx is dresidual is None)
    wants_weights = not (dweight is dbias is None)
    launches = []
    if not config.looped:
        kernel = layer_norm_backward_kernel
        launches.append(launch_of(kernel, (programs,), given, tile, config.num_warps))
    elif wants_rows:
        kernel = layer_norm_backward_looped_kernel
        launches.append(launch_of(kernel, (tiles,), given, tile, config.num_warps))
    if wants_weights:
        if config.looped:
            kernel = layer_norm_weights_kernel
            launches.append(launch_of(kernel, (blocks, programs), given, weights_tile, 8))
        sum_tile = dict(zip("PW", column_tile(width, machine, 64), strict=True))
        blocks = cdiv(width, sum_tile["W"])
        launches.append(launch_of(sum_programs_kernel, (blocks,), given, sum_tile, 8))
    return launches


def layer_norm_backward(
    call: LayerNormCall,
    source: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    dnew_residual: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    like = (source, None if call.residual is None else source, call.weight, call.bias)
    grads = tuple(
        contiguous_like(x) if need and x is not None else None
        for x, need in zip(like, needs, strict=True)
    )
    if rstd.numel():
        statistics, incoming, arch = (mean, rstd), (dy, dnew_residual), architecture(dy.device)
        for launch in backward_launches(call, source, statistics, incoming, grads, arch):
            launch.run()
        return grads
    return tuple(None if dx is None else dx.zero_() for dx in grads)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
