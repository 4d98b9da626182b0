"""torch.nn.functional's calls, served by our kernels: torch's signatures, dtypes and results.

Whoever replaces torch's own (``fastattn.nn``, ``override``, ``patch``) calls these. They differ
from the public functions in three things: under autocast the result has the dtype that torch's own
has on that device; what our kernels do not take (nested and sparse tensors, tensor subclasses,
integers, forward-mode derivatives) goes to torch's own function instead of being refused; and so
does a mistake, that its error be of the class and the words which callers of torch's expect, with
ours in the traceback before it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .ops import attention as attention_ops
from .ops import layer_norm as layer_norm_ops
from .ops import softmax as softmax_ops
from .spec import DTYPES, Refusal, is_causal_bias

_PARAMETER = torch.nn.Parameter
_sdpa = F.scaled_dot_product_attention
_STRIDED = torch.strided

# Where torch's autocast computes these in float32 is read off torch's own dispatch table: on GPUs
# it does, on the CPU it leaves the dtype alone.
_AUTOCAST_FLOAT32 = frozenset(
    (op, device.lower())
    for op, overload in (
        ("layer_norm", "layer_norm"),
        ("rms_norm", "rms_norm"),
        ("softmax", "softmax.int"),
    )
    for device in ("CPU", "CUDA", "XPU", "MPS")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{overload}", f"Autocast{device}")
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention; see ``fastattn``'s of that name."""
    keywords: Any = {"scale": scale, "enable_gqa": enable_gqa}
    arguments: Any = (query, key, value, attn_mask, dropout_p, is_causal)
    if served(query, key, value) and _is_mask(attn_mask):
        try:
            return attention_ops.scaled_dot_product_attention(*arguments, **keywords)
        except Refusal:
            return _sdpa(*arguments, **keywords)
    return _sdpa(*arguments, **keywords)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm; see ``fastattn.layer_norm``."""
    given: Any = (input, normalized_shape, weight, bias, eps)
    if not served(input, weight, bias):
        return F.layer_norm(*given)
    if autocasts_to_float32("layer_norm", input):
        input, weight, bias = _to_float32(input), _to_float32(weight), _to_float32(bias)
    try:
        return layer_norm_ops.layer_norm(input, normalized_shape, weight, bias, eps)
    except Refusal:
        return F.layer_norm(*given)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm; see ``fastattn.rms_norm``."""
    given: Any = (input, normalized_shape, weight, eps)
    if not served(input, weight):
        return F.rms_norm(*given)
    if autocasts_to_float32("rms_norm", input):
        input, weight = _to_float32(input), _to_float32(weight)
    try:
        return layer_norm_ops.rms_norm(input, normalized_shape, weight, eps)
    except Refusal:
        return F.rms_norm(*given)


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional.softmax; see ``fastattn.softmax``."""
    given: Any = (input, dim, _stacklevel + 1, dtype)
    takes = is_plain(input) if dtype in DTYPES else served(input)
    if (
        dim is None
        or not takes
        or input.is_complex()
        or (dtype is not None and dtype not in DTYPES)
    ):
        return F.softmax(*given)
    if (
        dtype is None
        and autocasts_to_float32("softmax", input)
        and input.dtype is not torch.float64
    ):
        dtype = torch.float32
    try:
        return softmax_ops.softmax(input, dim, dtype)
    except Refusal:
        return F.softmax(*given)


def served(*tensors: Tensor | None) -> bool:
    """Whether our kernels take these: plain tensors of our dtypes, no forward-mode derivatives."""
    for x in tensors:  # noqa: SIM110 -- faster than all(), and runs at every call
        if x is not None and (not is_plain(x) or x.dtype not in DTYPES):
            return False
    return True


def is_plain(x: Any) -> bool:
    """Whether x is a dense tensor without a subclass's rules of its own or a tangent to carry."""
    kind = type(x)
    if kind is not Tensor and kind is not _PARAMETER and not _is_traced(x):
        return False
    return x.layout is _STRIDED and not x.is_nested and forward_ad._current_level < 0


def _is_mask(attn_mask: Any) -> bool:
    return attn_mask is None or is_plain(attn_mask) or is_causal_bias(attn_mask)


def _is_traced(x: Any) -> bool:
    """Tensors of the compilers are subclasses, whose rules are to look at the op."""
    if torch.compiler.is_compiling():
        return isinstance(x, Tensor) and not is_traceable_wrapper_subclass(x)
    return isinstance(x, torch._subclasses.FakeTensor)


def autocasts_to_float32(op: str, x: Tensor) -> bool:
    """Whether autocast is on for x's device and has torch compute ``op`` in float32 there."""
    return attention_ops._under_autocast(x) and (op, x.device.type) in _AUTOCAST_FLOAT32


def _to_float32(x: Any) -> Any:
    return x if x is None or x.dtype is torch.float64 else x.to(torch.float32)


def bound(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """torch's own Python function, in which these names mean what is given.

    A torch function mode sees such a function as one call, and what it calls in turn no more; this
    one does not ask for modes.
    """
    scope = function.__globals__ | {"has_torch_function": lambda tensors: False} | names
    del scope["__name__"]  # by which torch.compile would find the module, and torch's names in it
    made = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.softmax: softmax,
    F.multi_head_attention_forward: bound(
        F.multi_head_attention_forward,
        scaled_dot_product_attention=scaled_dot_product_attention,
        softmax=softmax,
    ),
}
"""torch's function -> ours with the same signature."""
