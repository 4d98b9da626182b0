"""flash-attention 2's functions by their own names, on any device.

``from fastattn.compat.flash_attn import flash_attn_func`` in place of ``from flash_attn import
flash_attn_func`` is all that changes: argument order, defaults, the layout (B, S, H, D) and what is
returned are those of Dao-AILab/flash-attention (arXiv:2307.08691). float32 and float64 and any head
dim are taken too. Nothing is copied to change the layout: the kernels walk strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch, library, reference
from ..ops import attention as ops
from ..spec import AttentionSpec, Names, check_flag, check_number, check_tensor

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]

_NAMES = Names(window="window_size", scale="softmax_scale")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attention 2's function of this name.

    Args:
        q: (B, Sq, H, D), float32, bfloat16, float16 or float64, any strides.
        k: (B, Sk, Hkv, D), as q; H a multiple of Hkv.
        v: (B, Sk, Hkv, Dv).
        dropout_p: in [0, 1], the share of probabilities to drop; seeded by torch.manual_seed.
        softmax_scale: None: 1 / sqrt(D).
        causal: aligned bottom-right: the last query sees every key.
        window_size: (left, right), or a tensor of these: query i sees the keys from
            ``i + Sk - Sq - left`` to ``i + Sk - Sq + right``; -1: no limit.
        softcap: ``softcap * tanh(score / softcap)``; 0 or less: off.
        alibi_slopes: (H,) or (B, H): subtracts ``slope * |i + Sk - Sq - j|``.
        deterministic: require a bitwise repeatable backward, which it is anyway.
        return_attn_probs: return (out, lse, S_dmask).

    Returns:
        out (B, Sq, H, Dv) in q's dtype. With ``return_attn_probs`` also lse (B, H, Sq), the natural
        logarithm of each row's softmax denominator, -inf for a row that sees no key (theirs is
        +inf), and S_dmask: None without dropout, else (B, H, Sq, Sk) in q's dtype, the
        probabilities before dropout, negative where they were dropped. It is for tests: the whole
        matrix is made, without a gradient.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    _check_rank("q", q, 4, "(batch, sequence, heads, head_dim)")
    _check_rank("k", k, 4, "(batch, sequence, heads, head_dim)")
    _check_rank("v", v, 4, "(batch, sequence, heads, head_dim)")
    return _attend(
        _NAMES, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` of keys and values in one tensor, kv (B, Sk, 2, Hkv, D)."""
    _check_rank("kv", kv, 5, "(batch, sequence, 2, heads, head_dim)")
    k, v = kv.unbind(2)
    _check_rank("q", q, 4, "(batch, sequence, heads, head_dim)")
    return _attend(
        _NAMES._replace(k="kv", v="kv"), q, k, v, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` of all three in one tensor, qkv (B, S, 3, H, D)."""
    _check_rank("qkv", qkv, 5, "(batch, sequence, 3, heads, head_dim)")
    q, k, v = qkv.unbind(2)
    return _attend(
        _NAMES._replace(q="qkv", k="qkv", v="qkv"), q, k, v, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _attend(
    names: Names,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Any:
    check_flag("causal", causal)
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    if isinstance(window_size, Tensor):
        window_size = tuple(window_size.tolist())
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D) views
    variant: dict[str, Any] = {
        "causal": causal,
        "window": window_size,
        "scale": softmax_scale,
        "softcap": softcap if softcap is None else max(check_number("softcap", softcap), 0.0),
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "deterministic": True if deterministic else None,  # else as torch has it
        "names": names,
    }
    if return_attn_probs and dropout_p:
        out, lse, dropped = _with_probabilities(q, k, v, variant)
        return out.transpose(1, 2), lse, dropped
    out, lse = ops.attend(q, k, v, **variant)
    return (out.transpose(1, 2), lse, None) if return_attn_probs else out.transpose(1, 2)


def _check_rank(name: str, x: Any, rank: int, form: str) -> None:
    check_tensor(name, x)
    packed = {"kv": 2, "qkv": 3}.get(name)
    if x.dim() != rank or (packed is not None and x.shape[2] != packed):
        raise ValueError(f"{name}: expected shape {form}, got {tuple(x.shape)}")


def _with_probabilities(
    q: Tensor, k: Tensor, v: Tensor, variant: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, S_dmask): the call by its parts, since the seed has to be known."""
    if ops._under_autocast(q):
        q, k, v, _ = ops._autocast(q, k, v, None)
    slopes, deterministic = variant["alibi_slopes"], variant["deterministic"]
    spec = AttentionSpec.of(q, k, v, **variant)
    needs_grad = library.needs_grad(q, k, v, slopes)
    request = ops._request(q, k, v, None, slopes, None, spec, deterministic, needs_grad)
    chosen = dispatch.select(None, request).name
    arguments = (*ops.op_arguments(q, k, v, None, slopes, None, spec), chosen)
    out, lse, *_ = library.attention_forward.call(needs_grad, *arguments)
    with torch.no_grad():
        plain = (x.detach() if isinstance(x, Tensor) else x for x in arguments[:-1])
        call = library.attention_call(*plain)
        p = reference.attention_probabilities(call)
        assert call.seed is not None
        keep = reference.attention_dropout_keep(
            call.seed, call.dropout_p, q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        )
    return out, lse, torch.where(keep, p, -p).to(q.dtype)
