"""transformers' KV cache with room to grow, for the models that ``patch`` was given.

``DynamicCache`` joins its keys and values with each new token's by ``torch.cat``, which copies all
of them: at 1,000 tokens of GPT-2 that is a quarter of a token's time. Here a layer of it lies in a
buffer with room behind it, and a token copies itself only. What the cache hands out is a view.

Numbers that were handed out never change: only the room behind the last of them is written, and a
layer that somebody has cropped, reordered or shared since is copied to a buffer of its own first.
Where a gradient may be wanted, and under a tracer, the layers do as transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

_SPARE = 64  # tokens of room at least; else an eighth of those that are held


class _Buffer:
    """Keys or values (B, H, S, D) with room behind them; it writes behind `end` only."""

    def __init__(self, held: Tensor, new: int):
        batch, heads, length, dim = held.shape
        needed = length + new
        self.numbers = held.new_empty(batch, heads, needed + max(_SPARE, needed // 8), dim)
        self.numbers[:, :, :length] = held
        self.end = length

    def takes(self, held: Tensor, new: Tensor) -> bool:
        """Whether `held` is a view of this buffer up to its end, and there is room behind it."""
        numbers = self.numbers
        last = numbers.data_ptr() + self.end * numbers.stride(2) * numbers.itemsize
        return (
            held.data_ptr() + held.shape[2] * held.stride(2) * held.itemsize == last
            and held.stride() == numbers.stride()
            and held.shape[:2] == numbers.shape[:2]
            and self.end + new.shape[2] <= numbers.shape[2]
            and (torch.is_inference_mode_enabled() or not numbers.is_inference())
        )

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """A view of `held` and `new` one behind the other."""
        start, middle = self.end - held.shape[2], self.end
        self.end += new.shape[2]
        self.numbers[:, :, middle : self.end] = new
        return self.numbers[:, :, start : self.end]


def _plain_inference() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def _appends(held: Tensor | None, new: Tensor) -> bool:
    """Whether `new` can be written behind what is held, rather than joined by transformers."""
    return (
        held is not None
        and held.dim() == new.dim() == 4
        and held.numel() > 0
        and held.dtype is new.dtype
        and held.device == new.device
        and held.shape[:2] == new.shape[:2]
        and held.shape[3] == new.shape[3]
        and _is_memory(held)
        and _is_memory(new)
    )


def _is_memory(x: Tensor) -> bool:
    """Whether x is numbers in memory, and nothing of a tracer's or of torch.func's."""
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _append(layer: Any, name: str, new: Tensor) -> Tensor:
    """The layer's `name` (keys or values) and `new` one behind the other."""
    held, buffers = getattr(layer, name), layer.__dict__.setdefault("_buffers", {})
    if name not in buffers or not buffers[name].takes(held, new):
        buffers[name] = _Buffer(held, new.shape[2])
    return buffers[name].append(held, new)


def _append_both(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """All keys and values of a layer, or None where transformers is to join them."""
    if torch.compiler.is_compiling():  # which cannot trace what follows
        return None
    if _plain_inference() and _appends(layer.keys, keys) and _appends(layer.values, values):
        return _append(layer, "keys", keys), _append(layer, "values", values)
    layer.__dict__.pop("_buffers", None)
    return None


class AppendingLayer(cache_utils.DynamicLayer):
    """``DynamicLayer``, appended to in place."""

    _layer_type = None  # transformers keeps its own class for its type of layers

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        both = _append_both(self, key_states, value_states)
        if both is None:
            return super().update(key_states, value_states, *args, **keywords)
        self.keys, self.values = both
        return both


class AppendingSlidingWindowLayer(cache_utils.DynamicSlidingWindowLayer):
    """``DynamicSlidingWindowLayer``, appended to in place: the window moves along the buffer."""

    _layer_type = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        records_past = getattr(self, "record_past", False)
        both = None if records_past else _append_both(self, key_states, value_states)
        if both is None:
            return super().update(key_states, value_states, *args, **keywords)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = (x[:, :, -self.sliding_window + 1 :] for x in both)
        return both


_APPENDING: dict[Any, Any] = {
    cache_utils.DynamicLayer: AppendingLayer,
    cache_utils.DynamicSlidingWindowLayer: AppendingSlidingWindowLayer,
}


def _make_append(cache: Any) -> None:
    """Has the layers of a cache be appended to in place, where they are transformers' own."""
    if isinstance(cache, cache_utils.EncoderDecoderCache):
        _make_append(cache.self_attention_cache)
    elif isinstance(cache, cache_utils.DynamicCache) and not getattr(cache, "offloading", False):
        replicated = getattr(cache, "layer_class_to_replicate", None)
        if replicated in _APPENDING:
            cache.layer_class_to_replicate = _APPENDING[replicated]
        for layer in cache.layers:
            if type(layer) in _APPENDING:
                layer.__class__ = _APPENDING[type(layer)]


def before_forward(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """A forward pre-hook of a model, for whatever cache it is given."""
    if not _plain_inference():
        return
    for argument in (*args, *keywords.values()):
        if isinstance(argument, cache_utils.Cache):
            _make_append(argument)


def install(model: nn.Module) -> None:
    """Has a model of transformers append to the caches that it is given."""
    model.register_forward_pre_hook(before_forward, with_kwargs=True)


def installed(model: nn.Module) -> list[int]:
    """The hook's keys among the model's."""
    return [key for key, hook in model._forward_pre_hooks.items() if hook is before_forward]


def remove(model: nn.Module) -> bool:
    """Takes that back, also from a copy or a pickle of the model; whether there was anything."""
    keys = installed(model)
    for key in keys:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    return bool(keys)
