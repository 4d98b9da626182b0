"""Whom we are timed against on a GPU: torch's attention by each of its backends, FlexAttention,
what torch.compile makes of plain code, Liger's kernels and FlashAttention 3 where installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import AttentionCase, Case, Inputs, LayerNormCase, SoftmaxCase
from . import naive

Forward = Callable[[], Tensor]
LARGEST_MATRIX = 2**31  # bytes of scores that plain code may hold


class Absent(Exception):
    """Why a peer does not take part."""


def of(case: Case, inputs: Inputs) -> dict[str, Callable[[], Forward]]:
    """By name, what makes a peer's forward; making it or calling it may fail, which says why."""
    if isinstance(case, AttentionCase):
        backends = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}
        backends["efficient"] = "EFFICIENT_ATTENTION"
        makers: dict[str, Callable[[], Forward]] = {
            name: partial(_torch_attention, case, inputs, backend)
            for name, backend in backends.items()
        }
        makers["fa3"] = partial(_flash_attention_3, case, inputs)
    else:
        makers = {"torch": partial(_torch_operator, case, inputs)}
        makers["liger"] = partial(_liger, case, inputs)
    makers["compile"] = partial(_compiled, case, inputs)
    return makers


def _torch_operator(case: Case, inputs: Inputs) -> Forward:
    peer = case.torch_peer(inputs)
    if peer is None:
        raise Absent("torch has no such operator")
    return peer


def _torch_attention(case: AttentionCase, inputs: Inputs, backend: str) -> Forward:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    peer = _torch_operator(case, inputs)

    def call() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return peer()

    return call


def _flash_attention_3(case: AttentionCase, inputs: Inputs) -> Forward:
    if find_spec("flash_attn_interface") is None:
        raise Absent("FlashAttention 3 is not installed")
    if case.window or case.dropout_p or case.bias:
        raise Absent("not compared in this variant")
    function = import_module("flash_attn_interface").flash_attn_func
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")  # (B, S, H, D)

    def call() -> Tensor:
        out: Any = function(q, k, v, softmax_scale=case.scale, causal=bool(case.causal))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _compiled(case: Case, inputs: Inputs) -> Forward:
    """torch.compile of the naive form, which for rows is what people write."""
    if isinstance(case, AttentionCase):
        s = case.shape
        if s["B"] * s["H"] * s["M"] * s["N"] * case.dtype.itemsize > LARGEST_MATRIX:
            raise Absent("plain code would hold the whole matrix of scores")
        if case.window:
            raise Absent("not compared in this variant")
    plain = _plain(case, inputs)
    torch.compiler.reset()
    compiled = torch.compile(plain, dynamic=False)
    return lambda: compiled(inputs)


def _plain(case: Case, inputs: Inputs) -> Callable[[Inputs], Tensor]:
    if isinstance(case, LayerNormCase) and case.rms:
        shape = list(case.normalized_shape)
        return lambda inputs: F.rms_norm(inputs["x"], shape, inputs.get("weight"), case.eps)
    return lambda inputs: naive.run(case, inputs)


def _liger(case: Case, inputs: Inputs) -> Forward:
    if find_spec("liger_kernel") is None:
        raise Absent("liger-kernel is not installed")
    liger = import_module("liger_kernel.transformers.functional")
    x, weight, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
    if isinstance(case, SoftmaxCase):
        return lambda: liger.liger_softmax(x)
    if isinstance(case, LayerNormCase) and case.rms:
        eps = case.eps  # offset, casting as in Llama, and dy is not overwritten
        return lambda: liger.liger_rms_norm(x, weight, eps, 0.0, "llama", False)
    assert isinstance(case, LayerNormCase)
    eps = case.eps
    return lambda: liger.liger_layer_norm(x, weight, bias, eps)
