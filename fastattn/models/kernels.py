"""The three sets of kernels that a model runs on: fastattn's, the textbook's and torch's own.

`KERNELS["fused"]` is this library, `KERNELS["naive"]` each formula as the textbook has it, step by
step, and `KERNELS["torch"]` what PyTorch brings for the same. All three take the same arguments and
give the same numbers, up to rounding, so that a model is trained and timed on either.

Shapes: B batch, H heads, Hkv key/value heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

# ----------------------------------------------------------------------------------------- naive


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """(Sq, Sk), True where a query may look: itself and before, the last query sees every key."""
    queries, keys = q.shape[-2], k.shape[-2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


def naive_attention_weights(
    q: Tensor, k: Tensor, *, causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)), the whole (B, H, Sq, Sk) matrix: how much each query takes of each
    key. q (B, H, Sq, D), k (B, Hkv, Sk, D), bias a boolean mask, True = attend. `causal` is aligned
    bottom-right: the last query sees every key. A query that sees none gets zeros, not NaN.
    """
    if (group := q.shape[1] // k.shape[1]) > 1:
        k = k.repeat_interleave(group, 1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    keep = bias
    if causal:
        keep = causal_mask(q, k) if bias is None else causal_mask(q, k) & bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    weights = scores.softmax(-1)
    if bias is not None and keep is not None:
        weights = weights.masked_fill(~keep, 0.0)
    return weights


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: `naive_attention_weights` of v (B, Hkv, Sk, D)."""
    weights = naive_attention_weights(q, k, causal=causal, bias=bias)
    if (group := q.shape[1] // v.shape[1]) > 1:
        v = v.repeat_interleave(group, 1)
    return F.dropout(weights, dropout_p) @ v


def naive_layer_norm(
    x: Tensor, shape: tuple[int], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def add_then(layer_norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The layer norm of residual + dropout(x), and that sum, one operation after the other."""

    def add_layer_norm(
        x: Tensor, residual: Tensor, *affine: Any, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        total = residual + F.dropout(x, dropout_p)
        return layer_norm(total, *affine), total

    return add_layer_norm


naive_add_layer_norm = add_then(naive_layer_norm)


# ----------------------------------------------------------------------------------- torch's own


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """F.scaled_dot_product_attention with the arguments of the others.

    Its own `is_causal` is aligned top-left, which is the same where there are as many queries as
    keys; one query that sees every key needs no mask; what lies between gets a mask of its own.
    """
    square = causal and bias is None and q.shape[-2] == k.shape[-2]
    if causal and not square and q.shape[-2] > 1:
        bias = causal_mask(q, k) if bias is None else causal_mask(q, k) & bias
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        dropout_p=dropout_p,
        is_causal=square,
        enable_gqa=q.shape[1] != k.shape[1],
    )


# ---------------------------------------------------------------------------------------- the sets


class Kernels(NamedTuple):
    attention: Callable[..., Any]
    layer_norm: Callable[..., Any]
    add_layer_norm: Callable[..., Any]
    softmax: Callable[..., Any]


KERNELS = {
    "fused": Kernels(
        fastattn.attention, fastattn.layer_norm, fastattn.add_layer_norm, fastattn.softmax
    ),
    "naive": Kernels(naive_attention, naive_layer_norm, naive_add_layer_norm, torch.softmax),
    "torch": Kernels(torch_attention, F.layer_norm, add_then(F.layer_norm), torch.softmax),
}
