"""A reference Transformer on fastattn's kernels, whole in one file.

Reading order: the configuration, the building blocks (attention, feed-forward, residual connection,
embedding), the stacks (`Encoder`, `Decoder`), the models (`LanguageModel`, `EncoderDecoder`). Two
files beside it: `kernels.py`, the fused, naive and torch's own kernels that a model runs on
(`attention="fused"`, `"naive"`, `"torch"`), and `generation.py`, sampling and beam search.

Shapes: B batch, S sequence, E = d_model, H heads, D = E / H head dim, V vocabulary. A `mask` is a
boolean (B, S) padding mask, True where there is a real token.

Papers: Vaswani et al. 2017 (arXiv:1706.03762) for the architecture, Radford et al. 2019 (GPT-2) for
pre-norm and the initialisation, Xiong et al. 2020 (arXiv:2002.04745) for pre against post norm,
Ainslie et al. 2023 (arXiv:2305.13245) for grouped key/value heads, Press and Wolf 2017
(arXiv:1608.05859) for tied embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.generation import (
    Decoding,
    check_ids,
    check_length,
    decode,
    evaluating,
    repeat_rows,
)
from fastattn.models.kernels import KERNELS

IGNORE = -100  # a target that counts for no loss (padding)


# ------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class TransformerConfig:
    """The size and the kind of a model. Every field is checked; a bad one raises ValueError."""

    vocab_size: int
    max_len: int = 512  # the longest sequence, in tokens
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int | None = None  # fewer key/value than query heads (GQA, MQA); None: as many
    n_layers: int = 4  # in each stack
    d_ff: int | None = None  # width of the feed-forward layer; None: 4 * d_model
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    init_std: float = 0.02  # of the initial weights: GPT-2's, for a width of some hundreds
    norm: str = "pre"  # "pre" or "post"
    positions: str = "learned"  # "learned" or "sinusoidal"
    attention: str = "fused"  # "fused", "naive" or "torch": whose kernels, for every operation
    bias: bool = True  # in linear layers and layer norms
    tie_weights: bool = True  # one table embeds the tokens and predicts them
    segments: int = 0  # kinds of segments in a sequence (BERT: 2), each with an embedding; 0: none

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_len", "d_model", "n_heads", "n_layers", "kv_heads", "ff"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                field = {"kv_heads": "n_kv_heads", "ff": "d_ff"}.get(name, name)
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        if type(self.segments) is not int or self.segments < 0:
            raise ValueError(f"segments must be an integer of at least 0, got {self.segments!r}")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model must be a multiple of n_heads, got {self.d_model} and {self.n_heads}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.kv_heads}"
            )
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if not isinstance(self.init_std, (int, float)) or not 0.0 < self.init_std < math.inf:
            raise ValueError(f"init_std must be positive, got {self.init_std!r}")
        choices: dict[str, tuple[Any, ...]] = {
            "norm": ("pre", "post"),
            "positions": ("learned", "sinusoidal"),
            "attention": tuple(KERNELS),
            "bias": (True, False),
            "tie_weights": (True, False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, got {self.d_model}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ff(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


# ------------------------------------------------------------------------------ building blocks


class KVCache:
    """The keys and values that one attention has seen, (B, Hkv, capacity, D), filled in place.

    The buffers are allocated once, at the first append; what attention gets is a view of their
    filled part, so a generated token copies its own key and value and nothing else.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, Hkv, S, D) keys and values; views of all there are."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, got {self.length}")
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.filled()

    def select(self, rows: Tensor) -> None:
        """Hold these rows of the batch from here on, in this order; a row may come again."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, filled or not."""
        return sum(t.nbytes for t in (self.keys, self.values) if t is not None)

    def filled(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "nothing was appended yet"
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class MultiHeadAttention(nn.Module):
    """Self-attention over x, or cross-attention from x to a memory."""

    def __init__(self, config: TransformerConfig, causal: bool = False):
        super().__init__()
        self.config, self.causal = config, causal
        self.kernels = KERNELS[config.attention]
        kv_width = config.kv_heads * config.head_dim
        self.query = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.key_value = nn.Linear(config.d_model, 2 * kv_width, bias=config.bias)
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, heads * D) -> (B, heads, S, D), a view: the kernels walk the strides."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,  # (B, S, E)
        memory: Tensor | None = None,  # (B, M, E)
        mask: Tensor | None = None,  # (B, keys)
        cache: KVCache | None = None,
    ) -> Tensor:
        q = self.heads(self.query(x))
        if memory is not None and cache is not None and cache.length:
            k, v = cache.filled()  # the memory does not change from token to token
        else:
            k, v = map(self.heads, self.key_value(x if memory is None else memory).chunk(2, -1))
            if cache is not None:
                k, v = cache.append(k, v)
        attended = self.kernels.attention(  # (B, H, S, D)
            q,
            k,
            v,
            causal=self.causal,
            bias=None if mask is None else mask[:, None, None, :],
            dropout_p=self.config.dropout if self.training else 0.0,
        )
        return self.output(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The same two-layer perceptron at every position."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.input = nn.Linear(config.d_model, config.ff, bias=config.bias)
        self.output = nn.Linear(config.ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.input(x)))


class AddNorm(nn.Module):
    """x + dropout(branch) and its layer norm, in one kernel."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dropout = config.dropout
        self.kernels = KERNELS[config.attention]
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if config.bias else None

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the norm, the sum); with no branch to add, the sum is x."""
        affine = (x.shape[-1:], self.weight, self.bias)
        if branch is None:
            return self.kernels.layer_norm(x, *affine), x
        branch = branch.to(x.dtype)  # autocast: the stream stays in float32, branches do not
        dropout_p = self.dropout if self.training else 0.0
        return self.kernels.add_layer_norm(branch, x, *affine, dropout_p=dropout_p)


class Residual(nn.Module):
    """A residual connection with its layer norm around a sublayer.

        post: x <- norm(x + sublayer(x))
        pre:  x <- x + sublayer(norm(x))

    The pre-norm addition is left to the next norm, which does both in one pass over memory. So what
    flows through a stack is a pair (x, branch), and the stream is their sum.
    """

    def __init__(self, config: TransformerConfig, sublayer: MultiHeadAttention | FeedForward):
        super().__init__()
        self.pre = config.norm == "pre"
        self.norm = AddNorm(config)
        self.sublayer = sublayer

    def forward(
        self, x: Tensor, branch: Tensor | None, **context: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.pre:
            normed, x = self.norm(x, branch)
            return x, self.sublayer(normed, **context)
        normed, _ = self.norm(x, self.sublayer(x, **context))
        return normed, None


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory to attend to, feed-forward."""

    def __init__(self, config: TransformerConfig, causal: bool, cross: bool):
        super().__init__()
        self.self_attention = Residual(config, MultiHeadAttention(config, causal))
        self.cross_attention = Residual(config, MultiHeadAttention(config)) if cross else None
        self.feed_forward = Residual(config, FeedForward(config))

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        mask: Tensor | None,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        caches: tuple[KVCache, KVCache] | tuple[None, None],
    ) -> tuple[Tensor, Tensor | None]:
        x, branch = self.self_attention(x, branch, mask=mask, cache=caches[0])
        if self.cross_attention is not None:
            x, branch = self.cross_attention(
                x, branch, memory=memory, mask=memory_mask, cache=caches[1]
            )
        return self.feed_forward(x, branch)


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """(length, width): sin and cos of position / 10000^(2i / width), in turn along the width."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class Embedding(nn.Module):
    """Tokens, their positions and, where there are any, their segments as vectors."""

    table: Tensor  # (max_len, E), the sinusoids

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dropout = config.dropout
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position: nn.Embedding | None = None
        self.scale = 1.0
        if config.positions == "learned":
            self.position = nn.Embedding(config.max_len, config.d_model)
        else:  # the sinusoids have amplitude 1: the paper scales the tokens to match
            self.scale = math.sqrt(config.d_model)
            table = sinusoidal_positions(config.max_len, config.d_model)
            self.register_buffer("table", table.to(self.token.weight.dtype), persistent=False)
        self.segment = nn.Embedding(config.segments, config.d_model) if config.segments else None

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens (B, S), positions (S,) or (B, S), segments (B, S) -> (B, S, E)"""
        where = self.table[positions] if self.position is None else self.position(positions)
        x = self.scale * self.token(tokens) + where
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(tokens) if segments is None else segments)
        return F.dropout(x, self.dropout, self.training)


# --------------------------------------------------------------------------------------- stacks


class Stack(nn.Module):
    """An embedding and n_layers layers: tokens (B, S) -> (B, S, E)."""

    def __init__(self, config: TransformerConfig, causal: bool, cross: bool):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, causal, cross) for _ in range(config.n_layers))
        self.norm = AddNorm(config) if config.norm == "pre" else None
        self.apply(lambda module: initialise(module, config.init_std))
        # GPT-2: the more branches are summed, the smaller each starts
        branches = [m for m in self.modules() if isinstance(m, Residual)]
        for branch in branches:
            nn.init.normal_(
                branch.sublayer.output.weight, std=config.init_std / len(branches) ** 0.5
            )

    def run(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: list[tuple[KVCache, KVCache]] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        seen = cache[0][0].length if cache else 0
        check_tokens(tokens, self.config, seen)
        check_mask("mask", mask, tokens.shape[0], seen + tokens.shape[1])
        check_segments(segments, tokens, self.config)
        if mask is None:
            positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)
        else:  # padding takes no position, on whichever side it stands
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, seen:]
        x, branch = self.embedding(tokens, positions, segments), None
        for i, layer in enumerate(self.layers):
            caches = cache[i] if cache else (None, None)
            x, branch = layer(x, branch, mask, memory, memory_mask, caches)
        return x if self.norm is None else self.norm(x, branch)[0]


class Encoder(Stack):
    """Every token sees every other one: tokens (B, S), mask (B, S) -> hidden states (B, S, E).

    `segments` (B, S) says which segment of the sequence a token is in, where the configuration has
    any; None: all are in segment 0.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config, causal=False, cross=False)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        return self.run(tokens, mask, segments=segments)


class Decoder(Stack):
    """Every token sees itself and the ones before it, and the memory of an encoder if `cross`."""

    def __init__(self, config: TransformerConfig, cross: bool = False):
        super().__init__(config, causal=True, cross=cross)
        self.cross = cross

    def forward(
        self,
        tokens: Tensor,  # (B, S)
        mask: Tensor | None = None,  # (B, S), with a cache (B, seen + S)
        memory: Tensor | None = None,  # (B, M, E)
        memory_mask: Tensor | None = None,  # (B, M)
        cache: list[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        """Hidden states (B, S, E). With a cache, `tokens` are those that follow what it holds."""
        if self.cross != (memory is not None):
            raise ValueError(
                "a decoder with cross-attention needs memory"
                if self.cross
                else "this decoder has no cross-attention, but got memory"
            )
        if memory is not None:
            expected = (tokens.shape[0], self.config.d_model)
            if memory.ndim != 3 or (memory.shape[0], memory.shape[2]) != expected:
                raise ValueError(
                    f"memory must be (batch, length, d_model) with batch {expected[0]} and "
                    f"d_model {expected[1]}, got shape {tuple(memory.shape)}"
                )
            check_mask("memory_mask", memory_mask, *memory.shape[:2])
        return self.run(tokens, mask, memory, memory_mask, cache)

    def new_cache(self, capacity: int, memory_length: int = 0) -> list[tuple[KVCache, KVCache]]:
        """An empty cache: for each layer, that of the self-attention and of the cross-attention."""
        return [(KVCache(capacity), KVCache(memory_length)) for _ in self.layers]


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """GPT-2's initial weights: normal with standard deviation 0.02, zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def check_tokens(tokens: Tensor, config: TransformerConfig, seen: int = 0) -> None:
    """Shape, dtype and length. (Ids beyond the vocabulary are the embedding's to refuse.)"""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a torch.Tensor, got {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens must be (batch, length) with length > 0, got shape {tuple(tokens.shape)}"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
    if seen + tokens.shape[1] > config.max_len:
        raise ValueError(
            f"a sequence of {seen + tokens.shape[1]} tokens is longer than max_len {config.max_len}"
        )


def check_mask(name: str, mask: Tensor | None, batch: int, length: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor (True = a real token), got {got}")
    if mask.shape != (batch, length):
        raise ValueError(f"{name} must be ({batch}, {length}), got shape {tuple(mask.shape)}")


def check_segments(segments: Tensor | None, tokens: Tensor, config: TransformerConfig) -> None:
    """Shape and dtype. (Ids beyond config.segments are the embedding's to refuse.)"""
    if segments is None:
        return
    if not config.segments:
        raise ValueError("the configuration has no segments, but got segments")
    if not isinstance(segments, Tensor) or segments.dtype not in (torch.int64, torch.int32):
        got = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
        raise TypeError(f"segments must be an int64 or int32 tensor, got {got}")
    if segments.shape != tokens.shape:
        raise ValueError(
            f"segments must be {tuple(tokens.shape)}, got shape {tuple(segments.shape)}"
        )


# --------------------------------------------------------------------------------------- models


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean of -log softmax(logits)[target], in float32 or better; targets of IGNORE do not count.

    logits (B, S, V), targets (B, S). Its exponential is the perplexity. With label smoothing
    (Szegedy et al. 2016, arXiv:1512.00567) of e, a target is right with 1 - e and any token of the
    vocabulary with e / V: (1 - e) * -log p[target] + e * mean over the vocabulary of -log p.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must be {tuple(logits.shape[:-1])} to match the logits, "
            f"got shape {tuple(targets.shape)}"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten().long(),
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
    )


def prediction(config: TransformerConfig) -> nn.Linear:
    """The layer from hidden states to logits. A model that ties its weight replaces that."""
    head = nn.Linear(config.d_model, config.vocab_size, bias=config.bias and not config.tie_weights)
    initialise(head)  # small whatever init_std: the first guess is near uniform
    return head


class LanguageModel(nn.Module):
    """Decoder-only: P(w_t | w_1 .. w_t-1) = softmax(h_t W + b), with no b where W is tied."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.head = prediction(config)
        if config.tie_weights:
            self.head.weight = self.decoder.embedding.token.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, S, V): those at position t are of the token at t + 1."""
        return self.head(self.decoder(tokens, mask))

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, max_new_tokens: int, *, mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The prompt (B, P) and up to max_new_tokens more, (B, <= P + max_new_tokens).

        `options` are the fields of `generation.Decoding`: do_sample, temperature, top_k, top_p,
        seed, num_beams, length_penalty, stop_tokens, use_cache, stream. Prompts of unequal length
        are padded on the left, with `mask` (B, P) False there. ValueError for a prompt that is
        empty, has ids outside the vocabulary or, with its continuation, is longer than max_len.
        """
        decoding = Decoding(**options)
        check_tokens(prompt, self.config)
        check_ids("prompt", prompt, self.config)
        check_length(prompt, max_new_tokens, self.config)
        check_mask("mask", mask, *prompt.shape)
        total = prompt.shape[1] + max_new_tokens
        if mask is not None:  # what is generated is never padding
            if not mask[:, -1].all():
                raise ValueError("prompts must be padded on the left: mask[:, -1] has a False")
            mask = F.pad(mask, (0, max_new_tokens), value=True)
        cache = self.decoder.new_cache(total) if decoding.use_cache else None

        def next_logits(tokens: Tensor, length: int) -> Tensor:
            seen = None if mask is None else repeat_rows(mask[:, :length], len(tokens))
            return self.head(self.decoder(tokens, seen, cache=cache)[:, -1])

        softmax = KERNELS[self.config.attention].softmax
        with evaluating(self):
            return decode(next_logits, prompt, max_new_tokens, decoding, softmax, cache)


class EncoderDecoder(nn.Module):
    """The Transformer of the paper: source tokens in, target tokens out, over one vocabulary."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, cross=True)
        self.head = prediction(config)
        if config.tie_weights:
            self.encoder.embedding.token.weight = self.decoder.embedding.token.weight
            self.head.weight = self.decoder.embedding.token.weight

    def forward(
        self,
        source: Tensor,  # (B, M)
        target: Tensor,  # (B, S)
        source_mask: Tensor | None = None,  # (B, M)
        target_mask: Tensor | None = None,  # (B, S)
    ) -> Tensor:
        """Logits (B, S, V): those at position t are of the target token at t + 1."""
        memory = self.encoder(source, source_mask)
        return self.head(self.decoder(target, target_mask, memory, source_mask))

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,  # (B, M)
        max_new_tokens: int,
        *,
        start_token: int,
        source_mask: Tensor | None = None,  # (B, M)
        **options: Any,
    ) -> Tensor:
        """start_token and up to max_new_tokens more, (B, <= 1 + max_new_tokens), for a source. The
        encoder runs once, and its keys and values are cached; everything else is as in
        `LanguageModel.generate`.
        """
        decoding = Decoding(**options)
        check_tokens(source, self.config)
        check_ids("source", source, self.config)
        start = source.new_full((source.shape[0], 1), start_token)
        check_ids("start_token", start, self.config)
        check_length(start, max_new_tokens, self.config)
        cache = None
        if decoding.use_cache:
            cache = self.decoder.new_cache(1 + max_new_tokens, source.shape[1])
        softmax = KERNELS[self.config.attention].softmax
        with evaluating(self):
            memory = self.encoder(source, source_mask)

            def next_logits(tokens: Tensor, length: int) -> Tensor:
                rows = len(tokens)
                seen = None if source_mask is None else repeat_rows(source_mask, rows)
                hidden = self.decoder(tokens, None, repeat_rows(memory, rows), seen, cache)
                return self.head(hidden[:, -1])

            return decode(next_logits, start, max_new_tokens, decoding, softmax, cache)
