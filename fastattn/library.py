"""The torch.library ops: one for each direction of each family, whatever the backend.

An op unpacks its arguments into the call that backends understand. Its fake gives the shapes and
strides, for meta tensors and for torch.compile, to which an op is opaque. The autograd kernels are
registered in ``fastattn.ops``, where the autograd.Functions are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .backends.base import (
    AttentionCall,
    LayerNormCall,
    SoftmaxCall,
    empty_output,
    statistics_dtype,
)

_LIBRARY = torch.library.Library("fastattn", "DEF")

_ATTENTION_TENSORS = "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
_ATTENTION_SCALARS = (
    "float scale, float softcap, SymInt left, SymInt right, SymInt shift, float dropout_p, "
    "str backend"
)
_LAYER_NORM_SCALARS = "SymInt width, float eps, bool rms, float dropout_p, str backend"

_SCHEMAS = (
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_ATTENTION_TENSORS}, {_ATTENTION_SCALARS})"
    " -> (Tensor out, Tensor lse)",
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needs, "
    f"Tensor q, Tensor k, Tensor v, {_ATTENTION_TENSORS}, {_ATTENTION_SCALARS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_LAYER_NORM_SCALARS}) -> (Tensor y, Tensor new_residual, Tensor mean, Tensor rstd)",
    "layer_norm_backward(Tensor dy, Tensor? dnew_residual, Tensor source, Tensor mean, "
    "Tensor rstd, bool[] needs, bool has_residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_LAYER_NORM_SCALARS})"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    "softmax_forward(Tensor x, int dim, Tensor? mask, float scale, bool log, ScalarType dtype, "
    "str backend) -> Tensor",
    "softmax_backward(Tensor y, Tensor dy, int dim, float scale, bool log, ScalarType x_dtype, "
    "str backend) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)

below_autograd = torch._C._AutoDispatchBelowAutograd


def kernel(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated function as what op ``name`` runs, and ``fake`` for its shapes."""

    def register(run: Callable[..., Any]) -> Any:
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.fastattn, name).default

    return register


def register_autograd(op: Any, differentiable: Callable[..., Any]) -> None:
    """Makes calls of ``op`` itself differentiable, as ``differentiable(*args)`` computes them."""

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiable(*args)
        with below_autograd():
            return op(*args)

    _LIBRARY.impl(op._opname, run, "Autograd")


def in_plain_eager() -> bool:
    """No compiler and no functorch transform is looking: an autograd.Function may be applied
    directly, which spares the way through the op's autograd kernel."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


# -------------------------------------------------------------------------------------- attention


def attention_call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> AttentionCall:
    """The call of an op's arguments, without its backend: broadcasts what has to."""
    bias, alibi_slopes, sinks, seed, scale, softcap, left, right, shift, dropout_p = rest
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(q.shape[0], q.shape[1])
    return AttentionCall(
        q, k, v, bias, alibi_slopes, sinks, seed, scale, softcap, left, right, shift, dropout_p
    )


def _attention_forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_output(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


@kernel("attention_forward", _attention_forward_fake)
def attention_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return BACKENDS[args[-1]].attention_forward(attention_call(*args[:-1]))


def _attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], *args: Any
) -> tuple[Tensor, ...]:
    inputs = (*args[:4], args[5])  # q, k, v, bias, sinks
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format if i > 2 else None)
        if need
        else dout.new_empty(0)
        for i, (x, need) in enumerate(zip(inputs, needs, strict=True))
    )


@kernel("attention_backward", _attention_backward_fake)
def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], *args: Any
) -> tuple[Tensor, ...]:
    call = attention_call(*args[:-1])
    grads = BACKENDS[args[-1]].attention_backward(call, dout, dlse, out, lse, tuple(needs))
    dq, dk, dv, dbias, dsinks = (dout.new_empty(0) if dx is None else dx for dx in grads)
    return dq, dk, dv, dbias.view(args[3].shape) if needs[3] else dbias, dsinks


# ------------------------------------------------------------------------------------- layer norm


def _layer_norm_forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    width: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = _row_count(x, width), statistics_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else x.new_empty(x.shape),
        x.new_empty(0 if rms else rows, dtype=dtype),
        x.new_empty(rows, dtype=dtype),
    )


def _row_count(x: Tensor, width: int) -> int:
    return x.numel() // width if width else 0


@kernel("layer_norm_forward", _layer_norm_forward_fake)
def layer_norm_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = LayerNormCall(*args[:-1])
    y, new_residual, mean, rstd = BACKENDS[args[-1]].layer_norm_forward(call)
    if new_residual is None:
        new_residual = y.new_empty(0)
    return y, new_residual, rstd.new_empty(0) if mean is None else mean, rstd


def _layer_norm_backward_fake(
    dy: Tensor,
    dnew_residual: Tensor | None,
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    has_residual: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return tuple(
        source.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip((source, source, weight, bias), needs, strict=True)
    )


@kernel("layer_norm_backward", _layer_norm_backward_fake)
def layer_norm_backward(
    dy: Tensor,
    dnew_residual: Tensor | None,
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    has_residual: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *scalars, backend = rest
    call = LayerNormCall(source, source if has_residual else None, weight, bias, *scalars)
    grads = BACKENDS[backend].layer_norm_backward(
        call, source, None if call.rms else mean, rstd, dy, dnew_residual, tuple(needs)
    )
    return tuple(source.new_empty(0) if dx is None else dx for dx in grads)


# ---------------------------------------------------------------------------------------- softmax


def _softmax_forward_fake(
    x: Tensor,
    dim: int,
    mask: Tensor | None,
    scale: float,
    log: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@kernel("softmax_forward", _softmax_forward_fake)
def softmax_forward(
    x: Tensor,
    dim: int,
    mask: Tensor | None,
    scale: float,
    log: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    mask = None if mask is None else mask.expand(x.shape)
    return BACKENDS[backend].softmax_forward(SoftmaxCall(x, dim, mask, scale, log, dtype))


def _softmax_backward_fake(
    y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype, backend: str
) -> Tensor:
    return y.new_empty(y.shape, dtype=x_dtype)


@kernel("softmax_backward", _softmax_backward_fake)
def softmax_backward(
    y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype, backend: str
) -> Tensor:
    return BACKENDS[backend].softmax_backward(y, dy, dim, scale, log, x_dtype)
