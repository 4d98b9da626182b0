"""Hugging Face transformers: ``attn_implementation="fastattn"``.

transformers is imported by ``register`` only, and is no dependency of this package.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attend
from ..spec import Names, check_broadcasts

NAME = "fastattn"
_NAMES = Names(
    q="query",
    k="key",
    v="value",
    scale="scaling",
    bias="attention_mask",
    sinks="s_aux",
    dropout_p="dropout",
)

# What transformers is recording of the call that runs now, from ``register`` on: some models
# (GPT-2) tell their attention in no other way that its weights were asked for.
_collector: Any = None


def register() -> None:
    """Makes ``attn_implementation="fastattn"`` and ``model.set_attn_implementation("fastattn")``
    known to transformers, with the function that makes its masks. Twice is as good as once.

    Raises:
        ImportError: transformers is not installed, or older than version 5.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "fastattn.integrations.transformers: expected transformers 5 or later to be installed, "
            f"got {error}"
        ) from error
    global _collector
    try:
        from transformers.utils import output_capturing
    except ImportError:  # such a version passes output_attentions on
        pass
    else:
        _collector = getattr(output_capturing, "_active_collector", None)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def _answered_once(function: Any) -> Any:
    """functools.cache, of which torch.compile takes the answer instead of tracing what it calls."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def answer(*args: Any) -> Any:
        return cached(*args)

    answer.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return answer


def attention_mask(*args: Any, config: Any = None, **keywords: Any) -> Tensor | None:
    """transformers' own mask for sdpa: boolean (B, 1, Sq, Sk), True = attend, or None where the
    module's ``is_causal`` says it all. Models that are not made for it get eager's, additive."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    kind: Any = type(config)
    made = _made_for_such_masks(kind, getattr(config, "is_encoder_decoder", False))
    return (sdpa_mask if made else eager_mask)(*args, config=config, **keywords)


@_answered_once
def _made_for_such_masks(config: type, encoder_decoder: bool) -> bool:
    """Whether the models of this configuration can do with a mask that is boolean or None.

    Those have to that transformers lets use sdpa, or a causal one flash attention; others may have
    a wrong ``is_causal``, or add the mask to scores in code of their own.
    """
    from transformers import PreTrainedModel

    waiting, models = [PreTrainedModel], []
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if model.config_class is config:
            models.append(model)
    return all(m._supports_sdpa or (m._supports_flash_attn and not encoder_decoder) for m in models)


@_answered_once
def unknown_arguments(attention: type) -> tuple[str, ...]:
    """What a module of transformers may pass to its eager attention, and not to the one here."""
    eager = getattr(sys.modules.get(attention.__module__), "eager_attention_forward", None)
    if eager is None:
        return ()
    known = {*inspect.signature(attention_forward).parameters, "sliding_window"}
    taken = inspect.signature(eager).parameters.values()
    return tuple(x.name for x in taken if x.kind is not x.VAR_KEYWORD and x.name not in known)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in a model's attention.

    Args:
        module: whose ``is_causal`` counts where ``is_causal`` is None.
        query: (B, H, Sq, D).
        key, value: (B, Hkv, Sk, D), H a multiple of Hkv.
        attention_mask: broadcastable to (B, H, Sq, Sk); bool, True = attend, or additive.
        dropout: of the probabilities.
        scaling: None: 1 / sqrt(D).
        is_causal: with no mask and several queries, they see the keys up to their own.
        position_bias: added to the scores, with a gradient (T5).
        softcap: ``softcap * tanh(score / softcap)`` (Gemma 2).
        s_aux: (H,) sinks (gpt-oss).
        keywords: windows and positions, which the mask has; ``output_attentions=True`` has the
            weights computed, as the whole matrix.

    Returns:
        (out (B, Sq, H, D), weights (B, H, Sq, Sk) or None).

    Raises:
        TypeError, ValueError: an argument is wrong, or one of the model's that only its own eager
            attention knows.
    """
    kind: Any = type(module)
    for name in unknown_arguments(kind):
        if keywords.get(name) is not None:
            raise TypeError(
                f"{name}: expected None, got {type(keywords[name]).__name__}; only the eager "
                f"attention of {kind.__name__} takes it"
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    full = (*query.shape[:3], key.shape[2])
    for name, given in (("attention_mask", attention_mask), ("position_bias", position_bias)):
        if given is not None:
            check_broadcasts(name, given, full)
    bias = _bias(attention_mask, position_bias)
    if bias is not None and bias.dtype not in (torch.bool, torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    if _wants_weights(module, keywords):
        out, weights = _with_weights(
            query, key, value, bias, causal, dropout, scaling, softcap, s_aux
        )
        return out.transpose(1, 2), weights
    out, _ = attend(
        query,
        key,
        value,
        causal="top_left" if causal else False,
        scale=scaling,
        softcap=softcap,
        bias=bias,
        sinks=s_aux,
        dropout_p=dropout,
        names=_NAMES,
    )
    return out.transpose(1, 2), None


def _bias(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    if mask.dtype is torch.bool:
        return torch.where(mask, position_bias, -torch.inf)
    return position_bias + mask


def _wants_weights(module: nn.Module, keywords: dict[str, Any]) -> bool:
    asked = keywords.get("output_attentions")
    if asked:
        return True
    collected = None if _collector is None else _collector.get()
    if collected is not None:  # what the model was asked for, the config's wishes included
        for name in collected:  # noqa: SIM110 -- faster than any(), and runs at every call
            if "attentions" in name:
                return True
        return False
    if asked is not None:
        return False
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with the matrix of weights, in torch operations; a sink's column is left out."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = None
    if bias is not None:
        seen = bias if bias.dtype is torch.bool else None
        scores = scores if bias.dtype is torch.bool else scores + bias
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    weights = F.dropout(weights, dropout, dropout > 0)
    return weights @ v, weights
