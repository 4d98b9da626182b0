"""The CPU backend's layer norm and softmax: outputs, strides and one call into C++ each.

A tensor crosses as ``(address, stride, ...)``; ``rows.py`` says how it is walked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import LayerNormCall, Needs, SoftmaxCall, statistics_dtype
from .rows import columns_of, rows_of

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
            shape, held, strides = rows_of(width, x, residual)
            views = map(_view, held, strides)
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
            shape, held, strides = rows_of(call.width, source, dy, dnew_residual)
            source_view, dy_view, dnew_view = map(_view, held, strides)
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
        shape, held, strides, mask_inner = columns_of(call.dim, (x,), call.mask)
        view, *mask_view = map(_view, held, strides)
        mask = (mask_view[0], DTYPES[held[1].dtype], mask_inner) if mask_view else None
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
        shape, held, strides, _ = columns_of(dim, (y, dy))
        y_view, dy_view = map(_view, held, strides)
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


def _view(x: Tensor | None, strides: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if x is None or strides is None else (x.data_ptr(), *strides)
