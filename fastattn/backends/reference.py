"""Naive PyTorch behind the backend contract: any device, any variant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from .base import AttentionCall, Backend, LayerNormCall, Needs, SoftmaxCall, empty_output

if TYPE_CHECKING:
    from ..dispatch import Request


class ReferenceBackend(Backend):
    name = "reference"

    def reasons(self, request: Request) -> list[str]:
        return []

    def detail(self) -> str:
        return "naive PyTorch"

    def attention_forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, None]:
        out, lse = reference.attention(call)
        return empty_output(call.q, call.v.shape[-1]).copy_(out), lse, None

    def attention_backward(
        self,
        call: AttentionCall,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_low: Tensor | None,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        dq, dk, dv, dbias, dsinks = reference.attention_backward(call, dout, dlse)
        laid_out = (
            torch.empty_like(x).copy_(dx) for x, dx in ((call.q, dq), (call.k, dk), (call.v, dv))
        )
        return _asked((*laid_out, dbias, dsinks), needs)

    def layer_norm_forward(
        self, call: LayerNormCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        return reference.layer_norm(call)

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
        return _asked(reference.layer_norm_backward(call, source, dy, dnew_residual), needs)

    def softmax_forward(self, call: SoftmaxCall) -> Tensor:
        return reference.softmax(
            call.x, call.dim, call.mask, call.scale, call.log, call.dtype
        ).contiguous()

    def softmax_backward(
        self, y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
    ) -> Tensor:
        return reference.softmax_backward(y, dy, dim, scale, log, x_dtype)


def _asked(grads: tuple[Tensor | None, ...], needs: Needs) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
