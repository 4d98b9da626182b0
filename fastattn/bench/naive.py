"""The naive contender: what somebody writes in plain PyTorch, with autograd for the backward."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import AttentionCase, Case, Inputs, LayerNormCase, SoftmaxCase


def attention(case: AttentionCase, inputs: Inputs) -> Tensor:
    """softmax(scale q k^T + bias) v, the whole matrix in memory; causal aligned bottom-right."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if case.scale is None else case.scale
    scores = scale * (q @ k.transpose(-2, -1))  # (B, H, Sq, Sk)
    if "bias" in inputs:
        scores = scores + inputs["bias"]
    if case.causal:
        queries, keys = scores.shape[-2:]
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(
            keys - queries + 1
        )
        scores = scores.masked_fill(ahead, -math.inf)
    return F.dropout(scores.softmax(-1), case.dropout_p) @ v


def layer_norm(case: LayerNormCase, inputs: Inputs) -> Tensor:
    x = inputs["x"]
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + case.eps) * inputs["weight"] + inputs["bias"]


def softmax(case: SoftmaxCase, inputs: Inputs) -> Tensor:
    x = inputs["x"]
    powers = torch.exp(x - x.amax(case.dim, keepdim=True))
    return powers / powers.sum(case.dim, keepdim=True)


def run(case: Case, inputs: Inputs) -> Tensor:
    if isinstance(case, AttentionCase):
        return attention(case, inputs)
    if isinstance(case, LayerNormCase):
        return layer_norm(case, inputs)
    if isinstance(case, SoftmaxCase):
        return softmax(case, inputs)
    raise TypeError(f"no naive form of {type(case).__name__}")
