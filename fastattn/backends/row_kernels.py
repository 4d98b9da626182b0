"""Layer norm and softmax of the backends in C++ and CUDA C++: outputs, and one call into C++ each.

``rows.py`` says how the rows of a tensor are walked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import LayerNormCall, Needs, SoftmaxCall, statistics_dtype
from .rows import columns_of, rows_of


class RowKernels:
    """Mixed into the backend; ``module`` is the extension."""

    module: Any

    def launch_arguments(self) -> tuple[Any, ...]:
        """What this extension takes beside what is to be computed."""
        return ()

    def sums_workspace(
        self, call: LayerNormCall, rstd: Tensor, grads: tuple[Tensor | None, ...]
    ) -> tuple[Any, ...]:
        """The room that it wants for the sums of dweight and dbias, or nothing."""
        return ()

    def layer_norm_forward(
        self, call: LayerNormCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        call = _with_contiguous_weights(call)
        x, residual, width = call.x, call.residual, call.width
        rows = x.numel() // width if width else 0
        y = _empty(x)
        new_residual = None if residual is None else _empty(x)
        mean = rstd = None
        if call.for_backward:
            rstd = x.new_empty(rows, dtype=statistics_dtype(x.dtype))
            mean = None if call.rms else torch.empty_like(rstd)
        outputs = y, new_residual, mean, rstd
        if rows:
            walk = rows_of(width, x, residual)
            self.module.layer_norm_forward(call, walk, outputs, *self.launch_arguments())
        return outputs

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
        call = _with_contiguous_weights(call)
        like = (source, None if call.residual is None else source, call.weight, call.bias)
        grads = tuple(
            _empty(x) if need and x is not None else None
            for x, need in zip(like, needs, strict=True)
        )
        if rstd.numel():
            walk = rows_of(call.width, source, dy, dnew_residual)
            more = (*self.sums_workspace(call, rstd, grads), *self.launch_arguments())
            self.module.layer_norm_backward(call, walk, mean, rstd, grads, *more)
        else:
            for dx in grads:
                if dx is not None:
                    dx.zero_()
        return grads

    def softmax_forward(self, call: SoftmaxCall) -> Tensor:
        x = call.x
        y = _empty(x) if call.dtype is x.dtype else x.new_empty(x.shape, dtype=call.dtype)
        if x.numel():
            walk = columns_of(call.dim, (x,), call.mask)
            self.module.softmax_forward(call, walk, y, *self.launch_arguments())
        return y

    def softmax_backward(
        self, y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
    ) -> Tensor:
        dx = _empty(y) if x_dtype is y.dtype else y.new_empty(y.shape, dtype=x_dtype)
        if y.numel():
            walk = columns_of(dim, (y, dy))
            self.module.softmax_backward(walk, scale, log, dx, *self.launch_arguments())
        return dx


# ------------------------------------------------------------------------------------- the details


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _with_contiguous_weights(call: LayerNormCall) -> LayerNormCall:
    weight, bias = call.weight, call.bias
    if weight is not None and not weight.is_contiguous():
        call = call._replace(weight=weight.contiguous())
    if bias is not None and not bias.is_contiguous():
        call = call._replace(bias=bias.contiguous())
    return call
