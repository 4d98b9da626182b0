"""The models that the examples train, a training step each: what the kernels' share of it is.

Everyone trains the same model: on fastattn's kernels (ours), on torch's attention and layer norm
(torch), on the textbook's formulas (naive). Sizes are those of the examples, tokens are random, and
rows end in padding where the task's do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contenders import NAIVE, OURS, TORCH
from .whole_model import ModelBenchmark

KINDS = {OURS: "fused", TORCH: "torch", NAIVE: "naive"}  # how a model calls its kernels


@dataclass(frozen=True)
class TaskBenchmark(ModelBenchmark):
    """A model of `width`, `layers` and `heads` in training."""

    width: int = 128
    layers: int = 3
    heads: int = 2
    vocabulary: int = 1024

    task: ClassVar[str]
    op: ClassVar[str] = "task"
    contenders: ClassVar[tuple[str, ...]] = (OURS, TORCH, NAIVE)

    @property
    def id(self) -> str:
        return f"task-{self.task}-b{self.batch}_s{self.length}-{self.dtype}-{self.direction}"

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.batch, "S": self.length, "E": self.width, "layers": self.layers}

    def model(self, contender: str) -> Any:
        from ..models import TransformerConfig

        torch.manual_seed(0)
        config = TransformerConfig(
            vocab_size=self.vocabulary,
            max_len=self.length,
            d_model=self.width,
            n_heads=self.heads,
            n_layers=self.layers,
            attention=KINDS[contender],
        )
        return self.build(config)

    def build(self, config: Any) -> nn.Module:
        raise NotImplementedError

    def generate(self, model: Any, tokens: Tensor) -> object:
        raise NotImplementedError("tasks are trained")


class LanguageModelTask(TaskBenchmark):
    """Each token from those before it."""

    task = "language_model"

    def build(self, config: Any) -> nn.Module:
        from ..models import LanguageModel

        return LanguageModel(config)

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens)

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        from ..models import cross_entropy

        return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def padding(tokens: Tensor) -> Tensor:
    """(B, S), True where there is a token: every second row is whole, the others end earlier."""
    batch, length = tokens.shape
    row = torch.arange(batch)
    lengths = length - (row % 2) * (row % 8) * length // 16
    return torch.arange(length) < lengths[:, None]


class MaskedLanguageModelTask(TaskBenchmark):
    """Every seventh token from all the others, and whether the second half follows the first."""

    task = "masked_language_model"

    def build(self, config: Any) -> nn.Module:
        from ..models import MaskedLanguageModel

        return MaskedLanguageModel(replace(config, segments=2))

    def segments(self, tokens: Tensor) -> Tensor:
        return (torch.arange(tokens.shape[1]) >= tokens.shape[1] // 2).long().expand_as(tokens)

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens, padding(tokens), self.segments(tokens)).tokens

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        from ..models.transformer import IGNORE

        mask = padding(tokens)
        hidden = mask & (torch.arange(tokens.shape[1]) % 7 == 3)
        seen, targets = tokens.masked_fill(hidden, 0), tokens.masked_fill(~hidden, IGNORE)
        follows = torch.arange(len(tokens)) % 2 == 0
        words, pairs, _ = model.losses(seen, targets, follows, mask, self.segments(tokens))
        return words + pairs


class ClassificationTask(TaskBenchmark):
    """The kind of a text, from the mean of its states."""

    task = "classification"
    classes: ClassVar[int] = 8

    def build(self, config: Any) -> nn.Module:
        from ..models import SequenceClassifier

        return SequenceClassifier(config, self.classes)

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens, padding(tokens))

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(model, tokens), tokens[:, 0] % self.classes)


class EncoderDecoderTask(TaskBenchmark):
    """The last tokens from the first ones, through cross-attention."""

    source: ClassVar[float]  # the share of the tokens that is given

    def build(self, config: Any) -> nn.Module:
        from ..models import EncoderDecoder

        return EncoderDecoder(config)

    def sides(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        cut = round(self.source * tokens.shape[1])
        return tokens[:, :cut], tokens[:, cut:]

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        source, target = self.sides(tokens)
        return model(source, target, padding(source))

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        from ..models import cross_entropy

        target = self.sides(tokens)[1]
        return cross_entropy(self.logits(model, tokens)[:, :-1], target[:, 1:])


class TranslationTask(EncoderDecoderTask):
    """Texts of about one length."""

    task, source = "translation", 0.5


class SummaryTask(EncoderDecoderTask):
    """A short text from a long one."""

    task, source = "summary", 8 / 11


BENCHMARKS: tuple[TaskBenchmark, ...] = (
    LanguageModelTask("train_step", 16, 64, width=160, layers=2, heads=5, quick=False),
    LanguageModelTask("train_step", 4, 1024, quick=False),
    MaskedLanguageModelTask("train_step", 32, 64, layers=2, heads=4, vocabulary=2048, quick=False),
    ClassificationTask("train_step", 16, 64, layers=2, heads=4, vocabulary=2048, quick=False),
    TranslationTask("train_step", 32, 128, layers=2, heads=4, vocabulary=2000, quick=False),
    SummaryTask("train_step", 32, 88, layers=2, heads=4, vocabulary=2000, quick=False),
)
