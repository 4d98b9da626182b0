"""Softmax and its logarithm: the public functions, then their autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch, library, reference
from ..dispatch import Request
from ..spec import (
    DTYPES,
    RefusedIndex,
    RefusedType,
    RefusedValue,
    broadcasts,
    check_number,
    check_tensor,
    is_integer,
)


def softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``softmax(scale * input + mask)`` over ``dim``, in one pass.

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64.
        dim: the dimension that sums to one.
        dtype: cast the input to this first, which is the output's dtype too; None: input's.
        scale: multiplies the input.
        mask: broadcastable to input; bool, True = keep; or input's (cast) dtype or float32, added.
        backend: name one of ``fastattn.backends()``; None: the first that serves the call.

    Returns:
        A tensor of input's shape. A row of -inf is NaN, as in torch, unless a mask is given: then a
        row without anything to keep is zeros.

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong, or the named backend does not serve
            the call.
    """
    return _softmax(input, dim, dtype, scale, mask, False, backend)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The logarithm of ``softmax``, accurate where that rounds to 0; a masked row is -inf."""
    return _softmax(input, dim, dtype, scale, mask, True, backend)


def _softmax(
    x: Tensor,
    dim: int,
    dtype: torch.dtype | None,
    scale: float,
    mask: Tensor | None,
    log: bool,
    backend: str | None,
) -> Tensor:
    check_tensor("input", x)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
        raise RefusedType(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    if x.dtype not in DTYPES:
        if dtype is None or x.dtype.is_complex:
            raise RefusedType(
                f"input: expected float32, bfloat16, float16 or float64, or such a dtype=, "
                f"got {x.dtype}"
            )
        x = x.to(dtype)
    elif dtype is not None and dtype is not torch.float32:
        x = x.to(dtype)
    dtype = x.dtype if dtype is None else dtype
    if x.dtype is torch.float64:
        x = x.to(dtype)  # only widening to float32 is left to the kernel
    scale = check_number("scale", scale)
    dim = _check_dim(dim, x)
    if mask is not None:
        _check_mask(mask, x, dtype)
        if mask.requires_grad and torch.is_grad_enabled():  # rare: no kernel has its gradient
            x, scale, mask = x.to(dtype) * scale + mask, 1.0, torch.zeros_like(mask)
            x = x.to(dtype)
    if x.dim() == 0:
        mask = None if mask is None else mask.reshape(1)
        return _run(x.reshape(1), 0, mask, scale, log, dtype, backend).reshape(())
    return _run(x, dim, mask, scale, log, dtype, backend)


def _run(
    x: Tensor,
    dim: int,
    mask: Tensor | None,
    scale: float,
    log: bool,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    flags = (("log",) if log else ()) + (("mask",) if mask is not None else ())
    if dtype is not x.dtype:
        flags += ("cast",)
    request = Request("softmax", x.device, x.dtype, (x.shape,), flags, needs_grad)
    chosen = dispatch.select(backend, request).name
    arguments = (x, dim, mask, scale, log, dtype, chosen)
    return library.softmax_forward.call(needs_grad, *arguments)


class SoftmaxFunction(torch.autograd.Function):
    """Arguments of ``torch.ops.fastattn.softmax_forward``. The backward needs only the output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return library.softmax_forward.below_autograd(*arguments)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, dim, _, scale, log, _, backend = inputs
        ctx.save_for_backward(output)
        ctx.scalars = (dim, scale, log, x.dtype, backend)

    setup_context = keep

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = library.softmax_backward.call(
            torch.is_grad_enabled(),  # create_graph
            *ctx.saved_tensors,
            dy,
            *ctx.scalars,
        )
        return dx, *(None,) * 6


library.softmax_forward.differentiable_as(SoftmaxFunction)
library.double_backward(
    library.softmax_backward, lambda *args: (reference.softmax_backward(*args[:-1]),)
)


# ------------------------------------------------------------------------------------- the details


def _check_dim(dim: Any, x: Tensor) -> int:
    if not is_integer(dim):
        raise RefusedType(f"dim: expected an int, got {type(dim).__name__}")
    rank = max(x.dim(), 1)
    if not -rank <= dim < rank:
        raise RefusedIndex(f"dim: expected one of [{-rank}, {rank - 1}], got {dim}")
    return int(dim) % rank


def _check_mask(mask: Any, x: Tensor, dtype: torch.dtype) -> None:
    check_tensor("mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, x.dtype, dtype):
        raise RefusedType(f"mask: expected bool, float32 or {dtype}, got {mask.dtype}")
    if mask.device != x.device:
        raise RefusedValue(f"mask: expected device {x.device}, got {mask.device}")
    if not broadcasts(mask.shape, x.shape):
        raise RefusedValue(
            f"mask: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
