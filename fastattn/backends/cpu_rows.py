"""The CPU backend's layer norm and softmax: outputs, strides and one call into C++ each.

A tensor crosses as ``(address, stride, ...)`` and is walked where it lies when its rows are evenly
spaced along at most three dimensions; any other layout is copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .base import LayerNormCall, Needs, SoftmaxCall, statistics_dtype

# As in csrc/common/params.h.
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
}


class RowKernels:
    """Mixed into the backend; ``module`` is the extension."""

    module: Any

    def layer_norm_forward(
        self, call: LayerNormCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        x, residual, width = call.x, call.residual, call.width
        rows = x.numel() // width if width else 0
        statistics = statistics_dtype(x.dtype)
        y = _empty(x)
        new_residual = None if residual is None else _empty(x)
        mean = None if call.rms else torch.empty(rows, dtype=statistics)
        rstd = torch.empty(rows, dtype=statistics)
        if rows:
            shape, _held, views = _rows(width, x, residual)
            _held_too, sizes, addresses = _weights(call, shape, mean, rstd)
            outputs = (y.data_ptr(), 0 if new_residual is None else new_residual.data_ptr())
            dropped = _dropout(call)
            self.module.layer_norm_forward(sizes, *views, addresses, call.eps, dropped, outputs)
        return y, new_residual, mean, rstd

    def layer_norm_backward(
        self,
        call: LayerNormCall,
        source: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        dy: Tensor,
        dnew_residual: Tensor | None,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        rows = rstd.numel()
        like = (source, None if call.residual is None else source, call.weight, call.bias)
        grads = tuple(
            _empty(x) if need and x is not None else None
            for x, need in zip(like, needs, strict=True)
        )
        if rows:
            shape, _held, views = _rows(call.width, source, dy, dnew_residual)
            source_view, dy_view, dnew_view = views
            _held_too, sizes, addresses = _weights(call, shape, mean, rstd)
            outputs = tuple(0 if dx is None else dx.data_ptr() for dx in grads)
            self.module.layer_norm_backward(
                sizes, source_view, addresses, call.eps, _dropout(call), dy_view, dnew_view, outputs
            )
        else:
            for dx in grads:
                if dx is not None:
                    dx.zero_()
        return grads

    def softmax_forward(self, call: SoftmaxCall) -> Tensor:
        x = call.x
        y = _empty(x) if call.dtype is x.dtype else torch.empty(x.shape, dtype=call.dtype)
        if not x.numel():
            return y
        shape, _held, (view,), mask = _columns(call.dim, (x,), call.mask)
        codes = DTYPES[x.dtype], DTYPES[call.dtype]
        sizes = (*shape, *codes, call.log, torch.get_num_threads())
        self.module.softmax_forward(sizes, view, mask, call.scale, y.data_ptr())
        return y

    def softmax_backward(
        self, y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
    ) -> Tensor:
        dx = _empty(y) if x_dtype is y.dtype else torch.empty(y.shape, dtype=x_dtype)
        if not y.numel():
            return dx
        shape, _held, (y_view, dy_view), _ = _columns(dim, (y, dy))
        codes = DTYPES[x_dtype], DTYPES[y.dtype]
        sizes = (*shape, *codes, log, torch.get_num_threads())
        self.module.softmax_backward(sizes, y_view, dy_view, scale, dx.data_ptr())
        return dx


# ------------------------------------------------------------------------------------- the details


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)


def _weights(
    call: LayerNormCall, shape: tuple[int, int, int], mean: Tensor | None, rstd: Tensor
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, ...], tuple[int, ...]]:
    """(what to keep alive during the call, sizes, addresses)."""
    weight, bias = call.weight, call.bias
    weight_address = bias_address = weight_code = bias_code = 0
    if weight is not None:
        weight = weight.contiguous()
        weight_address, weight_code = weight.data_ptr(), DTYPES[weight.dtype]
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_code = bias.data_ptr(), DTYPES[bias.dtype]
    sizes = (
        *shape, call.width, DTYPES[call.x.dtype], weight_code, bias_code,
        call.rms, torch.get_num_threads(),
    )  # fmt: skip
    mean_address = 0 if mean is None else mean.data_ptr()
    addresses = weight_address, bias_address, mean_address, rstd.data_ptr()
    return (weight, bias), sizes, addresses


def _dropout(call: LayerNormCall) -> tuple[float, int] | None:
    return None if call.seed is None else (call.dropout_p, int(call.seed.item()))


def _rows(width: int, *tensors: Tensor | None) -> Any:
    """(rows along three dimensions, the tensors to keep alive, their views): tensors of one shape,
    whose trailing ``width`` numbers make a row."""
    views: list[tuple[int, ...] | None] = []
    for x in tensors:
        if x is None:
            views.append(None)
        elif x.is_contiguous():
            views.append((x.data_ptr(), 0, 0, width))
        else:
            break
    else:
        return (1, 1, tensors[0].numel() // width), tensors, views  # type: ignore[union-attr]
    shape = tensors[0].shape  # type: ignore[union-attr]
    lead, size = len(shape), 1
    while size < width:
        lead -= 1
        size *= shape[lead]
    held = [x if x is None or _dense(x, lead) else x.contiguous() for x in tensors]
    dims, strides = _merge(shape[:lead], [x.stride() for x in held if x is not None])
    if len(dims) > 3:
        return _rows(width, *(None if x is None else x.contiguous() for x in held))
    found = iter(strides)
    views = [None if x is None else (x.data_ptr(), *next(found)) for x in held]
    return _pad(dims), held, views


def _columns(dim: int, tensors: tuple[Tensor, ...], mask: Tensor | None = None) -> Any:
    """((n0, n1, n2, width, inner), the tensors to keep alive, their views, the mask's argument):
    tensors of one shape, seen as rows x width x inner columns."""
    shape = tensors[0].shape
    width, inner = shape[dim], prod(shape[dim + 1 :])
    views: list[tuple[int, ...]] = []
    if mask is None:
        step = width * inner
        for x in tensors:
            if not x.is_contiguous():
                break
            views.append((x.data_ptr(), 0, 0, step, inner))
        else:
            return (1, 1, tensors[0].numel() // step, width, inner), tensors, views, None
    # Numbers that are neighbours in a row, or across columns, must be neighbours in memory.
    adjacent = dim if inner == 1 else dim + 1
    held = [x if _dense(x, adjacent) else x.contiguous() for x in tensors]
    mask_inner = 1
    if mask is not None:
        if not any(
            s for n, s in zip(shape[dim + 1 :], mask.stride()[dim + 1 :], strict=True) if n > 1
        ):
            mask_inner = 0
        elif not _dense(mask, dim + 1):
            mask = mask.contiguous()
        held.append(mask)
    dims, strides = _merge(shape[:dim], [x.stride() for x in held])
    if len(dims) > 3:
        tensors = tuple(x.contiguous() for x in tensors)
        return _columns(dim, tensors, None if mask is None else mask.contiguous())
    views = [(x.data_ptr(), *outer, x.stride(dim)) for x, outer in zip(held, strides, strict=True)]
    argument = None if mask is None else (views.pop(), DTYPES[mask.dtype], mask_inner)
    return (*_pad(dims), width, inner), held, views, argument


def _dense(x: Tensor, lead: int) -> bool:
    """The dimensions from ``lead`` on are contiguous among themselves."""
    expected = 1
    for size, stride in zip(reversed(x.shape[lead:]), reversed(x.stride()[lead:]), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _merge(
    sizes: Sequence[int], strides: list[tuple[int, ...]]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The fewest dimensions that walk every one of the tensors: neighbours are joined where all
    allow it. The strides come back as three numbers a tensor, when there are three at most."""
    dims: list[int] = []
    steps: list[list[int]] = []  # one for each dimension: a stride for each tensor
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        step = [stride[i] for stride in strides]
        if dims and all(a == b * size for a, b in zip(steps[-1], step, strict=True)):
            dims[-1] *= size
            steps[-1] = step
        else:
            dims.append(size)
            steps.append(step)
    lead = [[0] * len(strides)] * (3 - len(dims))
    return dims, list(zip(*lead, *steps, strict=True))


def _pad(dims: list[int]) -> tuple[int, ...]:
    return (*(1,) * (3 - len(dims)), *dims)
