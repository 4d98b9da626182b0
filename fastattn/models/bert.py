"""Encoders that read a text from both sides, on fastattn's kernels: BERT and a classifier.

Reading order: what a prediction is made from (`TokenHead`, `mean_pool`), the model that is
pre-trained (`MaskedLanguageModel`), the one that is fine-tuned (`SequenceClassifier`).

Shapes: B batch, S sequence, E = d_model, V vocabulary, C classes. A `mask` is a boolean (B, S)
padding mask, True where there is a real token; it reaches the attention kernel, so that padding
changes no result. `segments` (B, S) says which of two texts a token belongs to.

Papers: Devlin et al. 2019 (arXiv:1810.04805) for BERT, Reimers and Gurevych 2019
(arXiv:1908.10084) for the mean of the states as what a text is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.transformer import (
    IGNORE,
    AddNorm,
    Encoder,
    TransformerConfig,
    check_mask,
    initialise,
)


def mean_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of a sequence's states where there are real tokens: (B, S, E) -> (B, E).

    Zeros for a sequence that is padding altogether.
    """
    if mask is None:
        return hidden.mean(1)
    check_mask("mask", mask, *hidden.shape[:2])
    total = hidden.masked_fill(~mask[..., None], 0.0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp_min(1)


def new_encoder(config: TransformerConfig) -> Encoder:
    """An encoder whose tokens start as large as their sinusoidal positions, if these it has: small
    ones would drown in them for hundreds of steps.
    """
    encoder = Encoder(config)
    if config.positions == "sinusoidal":
        nn.init.normal_(encoder.embedding.token.weight, std=(2 * config.d_model) ** -0.5)
    return encoder


class TokenHead(nn.Module):
    """Logits over the vocabulary: softmax(W norm(gelu(U h + c)) + b), W the embedding if tied."""

    def __init__(self, config: TransformerConfig, embedding: nn.Embedding):
        super().__init__()
        self.hidden = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.norm = AddNorm(config)
        self.output = nn.Linear(config.d_model, config.vocab_size)
        self.apply(initialise)
        if config.tie_weights:
            self.output.weight = embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V)"""
        normed, _ = self.norm(F.gelu(self.hidden(hidden)), None)
        return self.output(normed)


class PairHead(nn.Module):
    """Does the second text follow the first? u . tanh(U [a; b; |a - b|; a * b] + c) + d, with a and
    b the means of their states (Conneau et al. 2017, arXiv:1705.02364).

    BERT asks the state of [CLS] alone, which takes far longer to say anything: every comparison of
    the texts has to be found by attention first. From torch's initial weights, larger than those
    of the other layers, it learns sooner too.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.hidden = nn.Linear(4 * config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, 1)

    def forward(self, hidden: Tensor, mask: Tensor | None, segments: Tensor | None) -> Tensor:
        """(B, S, E) -> (B,)"""
        if segments is None:
            segments = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        real = torch.ones_like(segments, dtype=torch.bool) if mask is None else mask
        a, b = (mean_pool(hidden, real & (segments == i)) for i in (0, 1))
        compared = torch.cat((a, b, (a - b).abs(), a * b), -1)
        return self.output(self.hidden(compared).tanh())[:, 0]


class PretrainingLogits(NamedTuple):
    """What a `MaskedLanguageModel` says of a batch."""

    tokens: Tensor  # (B, S, V), or (N, V) of the N positions asked for
    follows: Tensor  # (B,): the logit of "the second segment follows the first"


class MaskedLanguageModel(nn.Module):
    """BERT: what is the hidden token, and does the second text follow the first?

    P(w_t | the other tokens) = softmax(W h_t + b), and P(follows) = sigmoid(z) by `PairHead`.
    ValueError for a configuration of fewer than two segments: a pair has two.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.segments < 2:
            raise ValueError(f"segments must be at least 2 for pairs, got {config.segments}")
        self.config = config
        self.encoder = new_encoder(config)
        self.token_head = TokenHead(config, self.encoder.embedding.token)
        self.pair_head = PairHead(config)

    def forward(
        self,
        tokens: Tensor,  # (B, S)
        mask: Tensor | None = None,  # (B, S)
        segments: Tensor | None = None,  # (B, S)
        predicted: Tensor | None = None,  # (B, S), boolean
    ) -> PretrainingLogits:
        """Logits of every token, or of those at the N positions that are True in `predicted`: with
        15 % of the tokens hidden, that saves most of the product with the vocabulary.
        """
        check_mask("predicted", predicted, *tokens.shape)
        hidden = self.encoder(tokens, mask, segments)
        wanted = hidden if predicted is None else hidden[predicted]
        return PretrainingLogits(self.token_head(wanted), self.pair_head(hidden, mask, segments))

    def losses(
        self,
        tokens: Tensor,  # (B, S), some of them hidden
        targets: Tensor,  # (B, S): what was there, IGNORE where nothing is to be predicted
        follows: Tensor,  # (B,), boolean
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, PretrainingLogits]:
        """(masked-token loss, next-sentence loss, logits of the hidden tokens and the pairs).

        Both are mean cross-entropies in float32 or better; BERT is trained on their sum. With no
        token to predict, the first is 0.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must be {tuple(tokens.shape)}, got shape {tuple(targets.shape)}"
            )
        if follows.shape != tokens.shape[:1] or follows.dtype != torch.bool:
            raise ValueError(
                f"follows must be boolean and ({tokens.shape[0]},), "
                f"got {follows.dtype} of shape {tuple(follows.shape)}"
            )
        predicted = targets != IGNORE
        logits = self(tokens, mask, segments, predicted)
        words, pairs = (x if x.dtype == torch.float64 else x.float() for x in logits)
        hidden = F.cross_entropy(words, targets[predicted].long(), reduction="sum")
        masked = hidden / predicted.sum().clamp_min(1)
        return masked, F.binary_cross_entropy_with_logits(pairs, follows.to(pairs.dtype)), logits


class SequenceClassifier(nn.Module):
    """Which of `classes` classes a text is in: softmax(W mean(h) + b), from an encoder's states."""

    def __init__(self, config: TransformerConfig, classes: int):
        super().__init__()
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 2:
            raise ValueError(f"classes must be an integer of at least 2, got {classes!r}")
        self.config = config
        self.encoder = new_encoder(config)
        self.head = nn.Linear(config.d_model, classes).apply(initialise)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """tokens (B, S), mask (B, S), segments (B, S) -> logits (B, C)"""
        return self.head(mean_pool(self.encoder(tokens, mask, segments), mask))

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Take the encoder's weights from the `state_dict` of a `MaskedLanguageModel` (or of any
        model with an `encoder`); the head stays as it is. ValueError where they do not fit.
        """
        prefix = "encoder."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        have = {name: tuple(w.shape) for name, w in weights.items()}
        want = {name: tuple(w.shape) for name, w in self.encoder.state_dict().items()}
        for name in sorted({*have, *want}):
            if have.get(name) != want.get(name):
                raise ValueError(
                    "the weights are of another configuration: "
                    f"{name} is {have.get(name)} there, {want.get(name)} here"
                )
        self.encoder.load_state_dict(weights)
