"""Layer norm and RMS norm: the public functions, then their autograd.Function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, library, reference
from ..backends.base import LayerNormCall, statistics_dtype
from ..dispatch import Request
from ..spec import (
    RefusedType,
    RefusedValue,
    check_dropout,
    check_dtype,
    check_number,
    check_tensor,
    is_integer,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.layer_norm (Ba et al., arXiv:1607.06450), with a choice of backend.

    Args:
        input: (*, *normalized_shape), float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the trailing dimensions to normalise over, at least one.
        weight: normalized_shape, in input's dtype or float32 (float64 for float64).
        bias: as weight, and in its dtype.
        eps: added to the variance.
        backend: name one of ``fastattn.backends()``; None: the first that serves the call.

    Returns:
        A tensor of input's shape and dtype, computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is wrong, or the named backend does not serve the call.
    """
    width = _check("input", input, normalized_shape, weight, bias)
    return _layer_norm(
        input, None, weight, bias, width, check_number("eps", eps), False, 0.0, backend
    )[0]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm (Zhang and Sennrich, arXiv:1910.07467), with backends.

    As ``layer_norm``, without mean and bias. The weight may have any floating dtype; ``eps=None``
    is the machine epsilon of the dtype computed in, as torch has it.
    """
    weight = _as_statistics(input, weight)
    width = _check("input", input, normalized_shape, weight, None)
    eps = _rms_eps(input, eps)
    return _layer_norm(input, None, weight, None, width, eps, True, 0.0, backend)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = residual + dropout(x)`` and its layer norm, in one pass.

    Args:
        x: the branch's output, as ``layer_norm``'s input.
        residual: the residual stream, of x's shape and dtype.
        normalized_shape, weight, bias, eps, backend: as for ``layer_norm``.
        dropout_p: in [0, 1], the share of x to drop; seeded by torch.manual_seed.

    Returns:
        (normed, new_residual), both of x's shape and dtype, both differentiable.
    """
    width = _check("x", x, normalized_shape, weight, bias)
    _check_residual(x, residual)
    return _layer_norm(
        x,
        residual,
        weight,
        bias,
        width,
        check_number("eps", eps),
        False,
        check_dropout(dropout_p),
        backend,
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = residual + dropout(x)`` and its RMS norm; see ``add_layer_norm``."""
    weight = _as_statistics(x, weight)
    width = _check("x", x, normalized_shape, weight, None)
    _check_residual(x, residual)
    return _layer_norm(
        x,
        residual,
        weight,
        None,
        width,
        _rms_eps(x, eps),
        True,
        check_dropout(dropout_p),
        backend,
    )


def _layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(y, new_residual) of sound arguments."""
    needs_grad = library.needs_grad(x, residual, weight, bias)
    flags = (("rms",) if rms else ()) + (("residual",) if residual is not None else ())
    if dropout_p:
        flags += ("dropout",)
    request = Request("layer_norm", x.device, x.dtype, (x.shape,), flags, needs_grad)
    chosen = dispatch.select(backend, request).name
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout_p > 0.0 else None

    arguments = (x, residual, weight, bias, seed, width, eps, rms, dropout_p, chosen)
    y, new_residual, *_ = library.layer_norm_forward.call(needs_grad, *arguments)
    return y, new_residual


class LayerNormFunction(torch.autograd.Function):
    """Arguments and results of ``torch.ops.fastattn.layer_norm_forward``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return library.layer_norm_forward.below_autograd(*arguments)

    shown = 2

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, seed, *ctx.scalars = inputs
        _, new_residual, mean, rstd = output
        ctx.has_residual = residual is not None
        source = new_residual if ctx.has_residual else x
        ctx.save_for_backward(source, mean, rstd, weight, bias, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        LayerNormFunction.keep(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dnew_residual: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        source, mean, rstd, weight, bias, seed = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
        grads = library.layer_norm_backward.call(
            torch.is_grad_enabled(),  # create_graph
            torch.zeros_like(source) if dy is None else dy,
            dnew_residual if ctx.has_residual else None,
            source,
            mean,
            rstd,
            [need_x, need_residual, need_weight, need_bias],
            ctx.has_residual,
            weight,
            bias,
            seed,
            *ctx.scalars,
        )
        dx, dresidual, dweight, dbias = grads
        return (
            dx if need_x else None,
            dresidual if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 6,
        )


def _composite_backward(
    dy: Tensor,
    dnew_residual: Tensor | None,
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    has_residual: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The backward op out of torch operations; ``mean`` and ``rstd`` follow from the source."""
    call = LayerNormCall(source, source if has_residual else None, *rest[:-1])
    grads = reference.layer_norm_backward(call, source, dy, dnew_residual)
    return tuple(
        grad if need and grad is not None else source.new_empty(0)
        for grad, need in zip(grads, needs, strict=True)
    )


library.layer_norm_forward.differentiable_as(LayerNormFunction)
library.double_backward(library.layer_norm_backward, _composite_backward)


# ------------------------------------------------------------------------------------- the details


def _check(name: str, x: Any, normalized_shape: Any, weight: Any, bias: Any) -> int:
    """How many numbers are normalised together, once all is found sound."""
    check_tensor(name, x)
    check_dtype(name, x)
    shape = _checked_shape(normalized_shape)
    if tuple(x.shape)[-len(shape) :] != shape:  # torch.Size is slow to slice
        raise RefusedValue(
            f"{name}: expected shape (*, {', '.join(str(n) for n in shape)}) to end in "
            f"normalized_shape, got {tuple(x.shape)}"
        )
    if weight is not None:
        _check_parameter("weight", weight, x, shape)
    if bias is not None:
        _check_parameter("bias", bias, x, shape)
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise RefusedType(f"bias: expected weight's dtype {weight.dtype}, got {bias.dtype}")
    return shape[0] if len(shape) == 1 else math.prod(shape)


def _checked_shape(normalized_shape: Any) -> tuple[int, ...]:
    listed = isinstance(normalized_shape, (tuple, list))
    if listed and len(normalized_shape) == 1 and type(normalized_shape[0]) is int:
        return tuple(normalized_shape)  # nearly always
    if not listed or not all(map(is_integer, normalized_shape)):
        raise RefusedType(
            f"normalized_shape: expected a tuple or list of ints, got {normalized_shape!r} "
            f"({type(normalized_shape).__name__})"
        )
    if not normalized_shape:
        raise RefusedValue("normalized_shape: expected at least one dimension, got none")
    return tuple(normalized_shape)


def _check_parameter(name: str, param: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, param)
    if param.shape != shape:
        raise RefusedValue(f"{name}: expected normalized_shape {shape}, got {tuple(param.shape)}")
    if param.dtype is not x.dtype and param.dtype is not statistics_dtype(x.dtype):
        raise RefusedType(
            f"{name}: expected {x.dtype} or {statistics_dtype(x.dtype)}, got {param.dtype}"
        )
    if param.device != x.device:
        raise RefusedValue(f"{name}: expected device {x.device}, got {param.device}")


def _check_residual(x: Tensor, residual: Any) -> None:
    check_tensor("residual", residual)
    if residual.shape != x.shape:
        raise RefusedValue(
            f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual.dtype is not x.dtype:
        raise RefusedType(f"residual: expected x's dtype {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise RefusedValue(f"residual: expected x's device {x.device}, got {residual.device}")


def _as_statistics(x: Any, weight: Any) -> Any:
    """RMS norm takes a weight of any floating dtype; the kernels take two."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dtype is x.dtype:
        return weight
    return weight.to(statistics_dtype(x.dtype)) if weight.is_floating_point() else weight


def _rms_eps(x: Tensor, eps: Any) -> float:
    if eps is None:
        return torch.finfo(statistics_dtype(x.dtype)).eps
    return check_number("eps", eps)
