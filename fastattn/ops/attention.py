"""Attention: the public functions, then their autograd.Function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, library, reference
from ..backends.base import statistics_dtype
from ..dispatch import Explanation, Request
from ..spec import AttentionSpec, Names, RefusedValue, check_flag, check_tensor, is_causal_bias

_TORCH_NAMES = Names("query", "key", "value", bias="attn_mask")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention without the matrix of scores in memory (FlashAttention, arXiv:2205.14135).

    All variants combine. The score of query i and key j is, in this order, ``scale * q_i.k_j``,
    soft-capped, minus ALiBi, plus the bias, masked; its softmax over j, dropped out, weighs v.

    Args:
        q: (B, Hq, Sq, D), float32, bfloat16, float16 or float64, any strides.
        k: (B, Hkv, Sk, D), as q; Hq a multiple of Hkv (GQA, arXiv:2305.13245).
        v: (B, Hkv, Sk, Dv).
        causal: True or "bottom_right": the last query sees every key, ``j <= i + Sk - Sq``;
            "top_left": ``j <= i``, as torch's is_causal. They differ where Sq != Sk.
        window: (left, right), how many keys a query sees on either side of its own position, the
            diagonal being aligned as ``causal`` says, else bottom-right; -1 or None: no limit.
        scale: of the dot products; None: 1 / sqrt(D).
        softcap: ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv:2408.00118); None or 0: off.
        alibi_slopes: (Hq,) or (B, Hq): subtracts ``slope * |i + shift - j|`` (arXiv:2108.12409),
            with the shift of the diagonal: Sk - Sq, or 0 for "top_left".
        bias: broadcastable to (B, Hq, Sq, Sk); bool, a mask where True means attend; else float32
            or q's dtype, added to the score, with a gradient in its own shape.
        sinks: (Hq,) logits that join each row's softmax and have no value (arXiv:2309.17453).
        dropout_p: in [0, 1], the share of probabilities to drop; seeded by torch.manual_seed.
        return_lse: return (out, lse), lse (B, Hq, Sq) the log of each row's softmax denominator in
            natural units, float32 (float64 for float64), differentiable.
        deterministic: require bitwise repeatable results; None: as
            ``torch.use_deterministic_algorithms`` has it.
        backend: name one of ``fastattn.backends()``; None: the first that serves the call.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype. A query that sees no key gives 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument is wrong, or the named backend does not serve the call.
    """
    check_flag("return_lse", return_lse)
    out, lse = attend(
        q, k, v, causal, window, scale, softcap, alibi_slopes, bias, sinks, dropout_p,
        deterministic, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


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
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with a choice of backend.

    Args:
        query: (..., Hq, L, E), two dimensions (L, E) or more; leading dimensions broadcast.
        key: (..., H, S, E).
        value: (..., H, S, Ev).
        attn_mask: broadcastable to (..., Hq, L, S); bool, True = attend; or float32 or query's
            dtype, added to the scores; or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: in [0, 1].
        is_causal: query i sees the keys j <= i (top-left), also where L != S.
        scale: None: 1 / sqrt(E).
        enable_gqa: allow Hq to be a multiple of H.
        backend: name one of ``fastattn.backends()``; None: the first that serves the call.

    Returns:
        (..., Hq, L, Ev) in query's dtype.

    Raises:
        TypeError, ValueError: an argument is wrong, or the named backend does not serve the call.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() < 2:
            raise RefusedValue(
                f"{name}: expected at least 2 dimensions, got shape {tuple(x.shape)}"
            )
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    causal: bool | str = "top_left" if is_causal else False
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
        if is_causal:
            raise RefusedValue("attn_mask: expected None with is_causal=True, got a tensor")
        if is_causal_bias(attn_mask):
            causal, attn_mask = _causal_of(attn_mask, query.shape[-2], key.shape[-2]), None
    lead = None
    if query.dim() != 4 or query.shape[:2] != key.shape[:2] or query.shape[:2] != value.shape[:2]:
        query, key, value, attn_mask, lead = _to_4d(query, key, value, attn_mask, enable_gqa)
    if _under_autocast(query):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    spec = AttentionSpec.of(
        query,
        key,
        value,
        causal=causal,
        scale=scale,
        bias=attn_mask,
        dropout_p=dropout_p,
        names=_TORCH_NAMES,
    )
    out, _ = _attention(query, key, value, attn_mask, None, None, spec, None, backend)
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend serves ``attention`` with these arguments, and why the others do not.

    Runs nothing. Print the result: the backend first, then one line for each that is known here.
    Its ``backend`` is the name, its ``reasons`` the lists of reasons by name.
    """
    check_flag("return_lse", return_lse)
    if isinstance(q, Tensor) and _under_autocast(q):
        q, k, v, bias = _autocast(q, k, v, bias)
    spec = AttentionSpec.of(
        q, k, v, causal, window, scale, softcap, alibi_slopes, bias, sinks, dropout_p, deterministic
    )
    needs_grad = library.needs_grad(q, k, v, bias, alibi_slopes, sinks)
    request = _request(q, k, v, bias, alibi_slopes, sinks, spec, deterministic, needs_grad)
    return dispatch.explain(backend, request)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    backend: str | None = None,
    names: Names | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``attention``, for callers whose arguments have other ``names``."""
    if isinstance(q, Tensor) and _under_autocast(q):
        q, k, v, bias = _autocast(q, k, v, bias)
    spec = AttentionSpec.of(
        q, k, v, causal, window, scale, softcap, alibi_slopes, bias, sinks, dropout_p,
        deterministic, names,
    )  # fmt: skip
    return _attention(q, k, v, bias, alibi_slopes, sinks, spec, deterministic, backend)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    spec: AttentionSpec,
    deterministic: bool | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that ``spec`` has found sound."""
    needs_grad = library.needs_grad(q, k, v, bias, alibi_slopes, sinks)
    request = _request(q, k, v, bias, alibi_slopes, sinks, spec, deterministic, needs_grad)
    chosen = dispatch.select(backend, request).name
    arguments = (*op_arguments(q, k, v, bias, alibi_slopes, sinks, spec), chosen)
    out, lse, *_ = library.attention_forward.call(needs_grad, *arguments)
    return out, lse


def op_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.fastattn.attention_forward``, without its backend."""
    mask, scale, softcap, dropout_p = spec
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(statistics_dtype(q.dtype))
        if library.needs_grad(alibi_slopes):  # rare: no kernel has their gradient
            bias, alibi_slopes = _alibi_as_bias(alibi_slopes, bias, mask.shift, q, k), None
    if sinks is not None:
        sinks = sinks.to(statistics_dtype(q.dtype)).contiguous()
    if bias is not None and library.needs_grad(bias) and _overlaps(bias):
        # Expanded by the caller: each element has a gradient of its own. Not contiguous(), which
        # leaves the strides of an empty tensor as they are.
        bias = bias.clone(memory_format=torch.contiguous_format)
    seed = torch.randint(2**63 - 1, (), device=q.device) if dropout_p > 0.0 else None
    return q, k, v, bias, alibi_slopes, sinks, seed, scale, softcap, *mask, dropout_p


class AttentionFunction(torch.autograd.Function):
    """Arguments and results of ``torch.ops.fastattn.attention_forward``; out and lse are
    differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return library.attention_forward.below_autograd(*arguments)

    shown = 2

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:7], *output)
        ctx.scalars = inputs[7:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AttentionFunction.keep(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        *inputs, out, lse, lse_low = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = [wanted[0], wanted[1], wanted[2], wanted[3], wanted[5]]
        grads = library.attention_backward.call(
            torch.is_grad_enabled(),  # create_graph
            torch.zeros_like(out) if dout is None else dout,
            dlse,
            out,
            lse,
            lse_low,
            needs,
            *inputs,
            *ctx.scalars,
        )
        dq, dk, dv, dbias, dsinks = [
            grad if need else None for grad, need in zip(grads, needs, strict=True)
        ]
        return dq, dk, dv, dbias, None, dsinks, *(None,) * 8


def _composite_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    needs: list[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """The backward op out of torch operations; out, lse and lse_low follow from the inputs."""
    call = library.attention_call(*arguments[:-1])
    dq, dk, dv, dbias, dsinks = reference.attention_backward(call, dout, dlse)
    if dbias is not None:
        dbias = dbias.view(arguments[3].shape)
    grads = (dq, dk, dv, dbias, dsinks)
    return tuple(
        grad if need and grad is not None else dout.new_empty(0)
        for grad, need in zip(grads, needs, strict=True)
    )


library.attention_forward.differentiable_as(AttentionFunction)
library.double_backward(library.attention_backward, _composite_backward)


# ------------------------------------------------------------------------------------- the details


def _request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    spec: AttentionSpec,
    deterministic: bool | None,
    needs_grad: bool,
) -> Request:
    flags: tuple[str, ...] = ()
    if bias is not None:
        flags += ("mask",) if bias.dtype is torch.bool else ("bias",)
    if alibi_slopes is not None:
        flags += ("alibi",)
    if sinks is not None:
        flags += ("sinks",)
    if spec.softcap:
        flags += ("softcap",)
    if spec.dropout_p:
        flags += ("dropout",)
    if torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic:
        flags += ("deterministic",)
    return Request("attention", q.device, q.dtype, (q.shape, k.shape, v.shape), flags, needs_grad)


def _under_autocast(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The casts of torch's own attention under autocast, except that a float32 bias stays."""
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v), bias if _is_float32(bias) else cast(bias)


def _is_float32(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype is torch.float32


def _alibi_as_bias(slopes: Tensor, bias: Tensor | None, shift: int, q: Tensor, k: Tensor) -> Tensor:
    distance = reference.alibi_distance(shift, q.shape[2], k.shape[2], slopes)
    penalty = -slopes[..., None, None] * distance  # (H, Sq, Sk) or (B, H, Sq, Sk)
    if bias is None:
        return penalty
    return torch.where(bias, penalty, -torch.inf) if bias.dtype is torch.bool else penalty + bias


def _overlaps(x: Tensor) -> bool:
    return any(x.stride(d) == 0 and x.shape[d] > 1 for d in range(x.dim()))


def _to_4d(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Broadcasts and folds the leading dimensions to (batch, heads); last, the output's own."""
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise RefusedValue(
            "enable_gqa: expected inputs of at least 3 dimensions (heads, sequence, head_dim), "
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    named = (("query", query), ("key", key), ("value", value))
    heads, kv_heads = _heads(query), _broadcast(named[1:], slice(-3, -2)) or (1,)
    if not enable_gqa and kv_heads != (1,):
        heads = kv_heads = _broadcast(named, slice(-3, -2))
    batch = _broadcast(named, slice(None, -3))

    def fold(x: Tensor, heads: tuple[int, ...]) -> Tensor:
        x = x.expand(*batch, *heads, *x.shape[-2:])
        return x.reshape(-1 if x.numel() else math.prod(batch), *heads, *x.shape[-2:])

    rank = max(query.dim(), key.dim(), value.dim())
    lead = (*batch, *heads) if rank > 2 else ()
    if attn_mask is not None and attn_mask.dim() > 2 and len(batch) > 1:
        attn_mask = _expand_mask(attn_mask, (*batch, *heads))
        attn_mask = attn_mask.reshape(-1, *heads, *attn_mask.shape[-2:])
    return fold(query, heads), fold(key, kv_heads), fold(value, kv_heads), attn_mask, lead


def _causal_of(attn_mask: Any, q_len: int, k_len: int) -> str:
    of = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
    if of != (q_len, k_len):
        raise RefusedValue(
            f"attn_mask: expected a causal bias of (q_len, k_len) = {(q_len, k_len)}, got {of}"
        )
    return "top_left" if attn_mask.variant.name == "UPPER_LEFT" else "bottom_right"


def _heads(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[-3:-2]) or (1,)


def _broadcast(named: tuple[tuple[str, Tensor], ...], dims: slice) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*(x.shape[dims] for _, x in named)))
    except RuntimeError:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named)
        raise RefusedValue(
            f"query: expected leading dimensions that broadcast, got {got}"
        ) from None


def _expand_mask(attn_mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    try:
        return attn_mask.expand(*lead, *attn_mask.shape[-2:])
    except RuntimeError:
        raise RefusedValue(
            f"attn_mask: expected leading dimensions that broadcast to {lead}, "
            f"got {tuple(attn_mask.shape)}"
        ) from None
