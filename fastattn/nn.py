"""torch.nn's modules on fastattn's kernels: subclasses with the same constructors, parameters,
``state_dict`` and results, so that one import is what changes.

A checkpoint of the one loads into the other, and a seed initialises both alike. What the kernels
do not take (nested tensors, tensor subclasses, forward-mode derivatives), and every call that is
wrong, goes to torch's own ``forward``, so that its answers and its errors are torch's too. For all
else, torch's inference fast path is left aside: the kernels here run in evaluation too.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import torch_calls
from .ops.layer_norm import add_layer_norm

__all__ = [
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm (Ba et al., arXiv:1607.06450); see ``fastattn.layer_norm`` for dtypes."""

    def forward(self, input: Tensor) -> Tensor:
        """(*, *normalized_shape) -> the same."""
        return torch_calls.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps
        )


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm (Zhang and Sennrich, arXiv:1910.07467); see ``fastattn.rms_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        """(*, *normalized_shape) -> the same."""
        return torch_calls.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Softmax(nn.Softmax):
    """torch.nn.Softmax; see ``fastattn.softmax``."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same, summing to one over ``dim``."""
        return torch_calls.softmax(input, self.dim, _stacklevel=5)


# ------------------------------------------------------------------------------------- attention


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention (Vaswani et al., arXiv:1706.03762).

    Without weights (``need_weights=False``) it is one fused kernel that walks the projections as
    they lie, whatever ``batch_first``; boolean masks stay boolean. With weights, the matrix of them
    is computed as torch does, with our softmax: a query that sees no key then gives NaN, as torch's
    does, where the fused kernel, as torch's, gives the output projection's bias.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: L queries, S keys, N batch, H heads, E = embed_dim.

        Args:
            query: (L, E), (N, L, E) with ``batch_first``, else (L, N, E).
            key: (S, kdim), (N, S, kdim) or (S, N, kdim).
            value: (S, vdim), (N, S, vdim) or (S, N, vdim).
            key_padding_mask: (S,) or (N, S); bool, True = ignore this key; or additive.
            need_weights: return the weights too.
            attn_mask: (L, S) or (N * H, L, S); bool, True = not allowed; or additive.
            average_attn_weights: weights (N, L, S), the mean over heads, instead of (N, H, L, S).
            is_causal: ``attn_mask`` is the causal mask, which need not be read then.

        Returns:
            (output in query's shape, weights or None).

        Raises:
            AssertionError, RuntimeError: torch's own, for shapes, dtypes and masks that do not fit.
        """
        masks = (key_padding_mask, attn_mask)
        if not self._is_sound(query, key, value, *masks, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        k, v, extra = self._add_keys(k, v)
        mask = self._merge(key_padding_mask, attn_mask, extra, q, query.dtype)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = F.dropout(self._weights(q, k, mask), dropout_p, dropout_p > 0.0)
            out = weights @ v  # (N, H, L, D)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = torch_calls.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        out = F.linear(out.permute(order).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if batched:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def _is_sound(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the call is one that the code here answers, rather than torch's own."""
        weight, bias = self.out_proj.weight, self.in_proj_bias
        if not torch_calls.served(query, key, value, weight):
            return False
        if bias is not None and bias.dtype is not weight.dtype:
            return False
        rank = query.dim()
        if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
            return False
        if query.shape[-1] != self.embed_dim or key.shape[:-1] != value.shape[:-1]:
            return False
        if key.shape[-1] != self.kdim or value.shape[-1] != self.vdim:
            return False
        batch, q_len, k_len = self._sizes(query, key)
        if rank == 3 and self._sizes(key, key)[0] != batch:
            return False
        for mask in (key_padding_mask, attn_mask):
            if mask is not None and not (
                torch_calls.is_plain(mask)
                and (mask.dtype is torch.bool or mask.is_floating_point())
            ):
                return False
        if key_padding_mask is not None:
            padded = (batch, k_len) if rank == 3 else (k_len,)
            if tuple(key_padding_mask.shape) != padded:
                return False
        if attn_mask is None:
            return not is_causal
        full = (batch * self.num_heads, q_len, k_len)
        return tuple(attn_mask.shape) in (full, full[1:])

    def _sizes(self, query: Tensor, key: Tensor) -> tuple[int, int, int]:
        """(batch, L, S)"""
        if query.dim() == 2:
            return 1, query.shape[0], key.shape[0]
        if self.batch_first:
            return query.shape[0], query.shape[1], key.shape[1]
        return query.shape[1], query.shape[0], key.shape[0]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (N, H, length, D), views of as few products as can be."""
        width, bias = self.embed_dim, self.in_proj_bias
        inputs: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            vectors = (None,) * 3 if bias is None else bias.chunk(3)
            inputs = (query, key, value)
            projected = [F.linear(*each) for each in zip(inputs, matrices, vectors, strict=True)]
        elif query is key and key is value:
            projected = list(F.linear(query, self.in_proj_weight, bias).chunk(3, -1))
        else:
            sizes = [width, 2 * width] if key is value else [width] * 3
            parts = self.in_proj_weight.split(sizes)
            biases = [None] * len(sizes) if bias is None else bias.split(sizes)
            inputs = (query, key) if key is value else (query, key, value)
            projected = [F.linear(*each) for each in zip(inputs, parts, biases, strict=True)]
            if key is value:
                projected[1:] = projected[1].chunk(2, -1)
        return tuple(map(self._heads, projected))

    def _heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _add_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """With ``add_bias_kv``'s key and ``add_zero_attn``'s at the end; how many there were."""
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        more_k, more_v = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            one = (1, self.num_heads, 1, self.head_dim)
            more_k.append(self.bias_k.view(one).expand(shape))
            more_v.append(self.bias_v.view(one).expand(shape))
        if self.add_zero_attn:
            more_k.append(k.new_zeros(shape))
            more_v.append(v.new_zeros(shape))
        extra = len(more_k) - 1
        return (torch.cat(more_k, 2), torch.cat(more_v, 2), extra) if extra else (k, v, 0)

    def _merge(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        extra: int,
        q: Tensor,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """One mask that broadcasts to (N, H, L, S + extra): bool, True = attend, or additive."""
        if key_padding_mask is not None:
            if attn_mask is not None and attn_mask.dtype is not key_padding_mask.dtype:
                warnings.warn(
                    "Support for mismatched key_padding_mask and attn_mask is deprecated. "
                    "Use same type for both instead.",
                    stacklevel=3,
                )
            k_len = key_padding_mask.shape[-1]  # no -1: there may be no query or no key
            key_padding_mask = key_padding_mask.view(q.shape[0], 1, 1, k_len)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(q.shape[0], self.num_heads, *attn_mask.shape[1:])
        masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
        if extra:
            masks = [F.pad(mask, (0, extra)) for mask in masks]
        if not masks:
            return None
        if all(mask.dtype is torch.bool for mask in masks):
            return ~functools.reduce(torch.logical_or, masks)
        additive = [
            torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
            if mask.dtype is torch.bool
            else mask
            for mask in masks
        ]
        return sum(additive[1:], additive[0])

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """(N, H, L, S) probabilities."""
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.mT
        if mask is not None:
            if mask.dtype is torch.bool:
                scores = scores.masked_fill(~mask, -math.inf)
            else:
                scores = scores + mask.to(scores.dtype)
        return torch_calls.softmax(scores, -1)


# --------------------------------------------------------------------------------------- layers


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _add_norm(branch: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(residual + branch), residual + branch), in one kernel where nobody would notice."""
    if residual.dtype is torch.float32 and branch.dtype in (torch.bfloat16, torch.float16):
        branch = branch.to(torch.float32)  # autocast: the addition would promote it
    if (
        type(norm) is LayerNorm
        and not _has_hooks(norm)
        and branch.dtype is residual.dtype
        and branch.shape == residual.shape
        and torch_calls.served(branch, residual, norm.weight, norm.bias)
        and (
            residual.dtype is torch.float32
            or not torch_calls.autocasts_to_float32("layer_norm", residual)
        )
    ):
        return add_layer_norm(
            branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
    total = residual + branch
    return norm(total), total


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, with residual additions and norms in one kernel."""

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src (S, E), (N, S, E) with ``batch_first``, else (S, N, E) -> the same; masks as for
        ``MultiheadAttention``."""
        if src.is_nested:  # only torch's fast path takes it
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            branch = self._sa_block(self.norm1(src), *masks)
            normed, x = _add_norm(branch, src, self.norm2)
            return x + self._ff_block(normed)
        x, _ = _add_norm(self._sa_block(src, *masks), src, self.norm1)
        return _add_norm(self._ff_block(x), x, self.norm2)[0]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, with residual additions and norms in one kernel."""

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt and memory as ``MultiheadAttention``'s query and key -> tgt's shape."""
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            normed, x = _add_norm(self._sa_block(self.norm1(tgt), *own), tgt, self.norm2)
            normed, x = _add_norm(self._mha_block(normed, *cross), x, self.norm3)
            return x + self._ff_block(normed)
        x, _ = _add_norm(self._sa_block(tgt, *own), tgt, self.norm1)
        x, _ = _add_norm(self._mha_block(x, *cross), x, self.norm2)
        return _add_norm(self._ff_block(x), x, self.norm3)[0]


# --------------------------------------------------------------------------------------- stacks


def _is_causal(mask: Tensor | None, is_causal: bool | None, x: Tensor, batch_first: bool) -> bool:
    """What the layers are told: None asks whether the mask is the causal one, which takes its
    values, so that a compiler is told no; the mask itself says the same."""
    if is_causal is not None or mask is None or torch.compiler.is_compiling():
        return is_causal is True
    if mask.is_meta or isinstance(mask, torch._subclasses.FakeTensor):
        return False
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        return False  # refused by the attention, by its name
    length = x.shape[1 if batch_first and x.dim() == 3 else 0]
    if tuple(mask.shape) != (length, length):
        return False
    if mask.dtype is torch.bool:
        causal = torch.ones_like(mask).triu(1)
    else:
        causal = torch.full_like(mask, -math.inf).triu(1)
    return bool((mask == causal).all())


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder, without its detour through nested tensors in evaluation.

    Where torch would take that, the padded positions of its result are zeros (before the final
    norm). They are here too.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """src through the layers in turn; shapes and masks as ``TransformerEncoderLayer``'s."""
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        batch_first = self.layers[0].self_attn.batch_first
        is_causal = _is_causal(mask, is_causal, src, batch_first)
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                is_causal=is_causal,
                src_key_padding_mask=src_key_padding_mask,
            )
        if (
            src_key_padding_mask is not None
            and mask is None
            and src.dim() == 3
            and self._torch_would_nest(src, src_key_padding_mask)
        ):
            output = output.masked_fill((src_key_padding_mask != 0).unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _torch_would_nest(self, src: Tensor, padding: Tensor) -> bool:
        first = self.layers[0]
        if not getattr(self, "use_nested_tensor", False) or first.training:
            return False
        if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in (src, *first.parameters())):
            return False
        if not getattr(self, "mask_check", True):
            return True
        if torch.compiler.is_compiling() or padding.is_meta:
            return False
        padded = padding != 0  # True only after the last real token
        return not bool((padded[:, :-1] & ~padded[:, 1:]).any())


class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder, compiled without a break: its masks' values are not asked."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt through the layers in turn; as ``TransformerDecoderLayer``."""
        batch_first = self.layers[0].self_attn.batch_first
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal, tgt, batch_first)
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer):
    """torch.nn.Transformer of the modules above; custom encoders and decoders stay as they are."""

    @functools.wraps(nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        custom = dict(zip(("custom_encoder", "custom_decoder"), args[6:8], strict=False))
        custom |= keywords
        for name in ("encoder", "decoder"):
            if custom.get(f"custom_{name}") is None:
                adopt(self.get_submodule(name))


OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.Softmax: Softmax,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}
"""torch's class -> ours. Instances differ in nothing but the class."""


def refuse_scripting(module: nn.Module) -> Any:
    """What torch.jit.script asks of a module, and of all in it, before it compiles anything."""
    raise TypeError(
        f"torch.jit.script: expected code that it can compile, got {type(module).__name__} by "
        "fastattn, which calls kernels; unpatch the model before, or use torch.compile, "
        "torch.export or torch.jit.trace"
    )


for _mine in OURS.values():
    _mine.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]


def adopt(root: nn.Module) -> None:
    """Makes torch's modules in ``root`` ours, by their class: they stay the same objects."""
    for module in root.modules():
        ours = OURS.get(type(module))
        if ours is not None:
            module.__class__ = ours
