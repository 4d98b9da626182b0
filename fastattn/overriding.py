"""Ways to have torch's own calls served here without touching the model: ``override`` and torch's
registry of flash attention implementations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.overrides import TorchFunctionMode

from . import dispatch, library, torch_calls
from .dispatch import Request
from .spec import DTYPES

_ROUTES = tuple(torch_calls.ROUTES.items())


class override(TorchFunctionMode):
    """Inside ``with fastattn.override():``, torch's functional calls are served by fastattn.

    ``F.scaled_dot_product_attention``, ``F.layer_norm``, ``F.rms_norm`` and ``F.softmax``, however
    they were imported, and the torch.nn modules that call them, ``MultiheadAttention`` among them
    (whose inference fast path stands aside). Only in the thread that entered the block, until it is
    left, by an exception too. Blocks nest, and torch.compile traces through them.

    What runs later is outside: call ``backward()`` inside the block too where activations are
    checkpointed in it. Tensors that the kernels do not take go to torch's own function.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        classes: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # Methods in Python that end in a super() call, at which the compiler stops when it
            # traces into them as functions; as methods it knows them.
            if func is Tensor.unflatten:
                return args[0].unflatten(*args[1:], **kwargs)
            if func is Tensor.split:
                return args[0].split(*args[1:], **kwargs)
            for theirs, mine in _ROUTES:  # a loop: it cannot look a function up
                if func is theirs:
                    return mine(*args, **kwargs)
            return func(*args, **kwargs)
        again = _BACKWARDS.get(func)
        if again is not None:
            with self:  # what is checkpointed is computed again in there, by our kernels again
                return again(*args, **kwargs)
        return torch_calls.ROUTES.get(func, func)(*args, **kwargs)


def _backward_of(
    tensor: Tensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Tensor.backward, of which a torch function mode is not told."""
    _backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


_backward = torch_calls.bound(torch.autograd.backward)
_BACKWARDS = {
    Tensor.backward: _backward_of,
    torch.autograd.backward: _backward,
    torch.autograd.grad: torch_calls.bound(torch.autograd.grad),
}


# ------------------------------------------------------------------- torch's registry of kernels

_NAME = "fastattn"


class _Handle:
    """Keeps the kernels in torch's dispatcher until ``restore_flash_attention_impl``."""

    def __init__(self, *libraries: torch.library.Library) -> None:
        self.libraries = libraries

    def remove(self) -> None:
        for lib in self.libraries:
            lib._destroy()
        self.libraries = ()


def register() -> None:
    """Makes ``torch.nn.attention.activate_flash_attention_impl("fastattn")`` known to torch, which
    has the registry from 2.11 on. Activates nothing."""
    add = getattr(torch_attention, "register_flash_attention_impl", None)
    if add is not None:
        add(_NAME, register_fn=_activate)


def _activate() -> _Handle:
    """Puts our kernels in the place of torch's flash attention, behind its own choice of kernel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        return _Handle(*_libraries())


def _libraries() -> Iterator[torch.library.Library]:
    cpu = torch.library.Library("aten", "IMPL", "CPU")
    cpu.impl("_scaled_dot_product_flash_attention_for_cpu", _cpu_forward, allow_override=True)
    cpu.impl(
        "_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_backward, allow_override=True
    )
    yield cpu
    if not torch.cuda.is_available():
        return
    cuda = torch.library.Library("aten", "IMPL", "CUDA")
    cuda.impl("_scaled_dot_product_flash_attention", _cuda_forward, allow_override=True)
    cuda.impl("_scaled_dot_product_flash_attention_backward", _cuda_backward, allow_override=True)
    yield cuda


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.fastattn.attention_forward`` for torch's top-left alignment."""
    if q.dtype not in DTYPES:
        raise TypeError(f"query: expected one of {DTYPES}, got {q.dtype}")
    flags: tuple[str, ...] = ("dropout",) if dropout_p else ()
    if mask is not None:
        flags += ("mask",) if mask.dtype is torch.bool else ("bias",)
    shapes = (q.shape, k.shape, v.shape)
    backend = dispatch.select(None, Request("attention", q.device, q.dtype, shapes, flags, True))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    right = 0 if is_causal else -1
    return q, k, v, mask, None, None, seed, scale, 0.0, -1, right, 0, dropout_p, backend.name


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    arguments = _arguments(query, key, value, attn_mask, None, dropout_p, is_causal, scale)
    out, lse, _ = library.attention_forward.run(*arguments)
    return out, lse


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _arguments(query, key, value, attn_mask, None, dropout_p, is_causal, scale)
    return _gradients(grad_out, out, logsumexp, arguments)


def _gradients(
    grad_out: Tensor, out: Tensor, lse: Tensor, arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    needs = [True, True, True, False, False]
    low = torch.zeros_like(lse)
    grads = library.attention_backward.run(grad_out, None, out, lse, low, needs, *arguments)
    return grads[0], grads[1], grads[2]


def _cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    # torch keeps two tensors between forward and backward for its generator: one holds our seed.
    seed = torch.randint(2**63 - 1, (), device=query.device) if dropout_p else None
    arguments = _arguments(query, key, value, None, seed, dropout_p, is_causal, scale)
    out, lse, _ = library.attention_forward.run(*arguments)
    kept = seed if seed is not None else torch.zeros((), dtype=torch.int64, device=query.device)
    unused, debug = kept.new_empty(0), out.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], kept, unused, debug


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    seed = philox_seed if dropout_p else None
    arguments = _arguments(query, key, value, None, seed, dropout_p, is_causal, scale)
    return _gradients(grad_out, out, logsumexp, arguments)
