"""The reference Transformer, fused against naive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .contenders import NAIVE, OURS
from .whole_model import ModelBenchmark

LAYERS, WIDTH, HEADS = 4, 256, 4


@dataclass(frozen=True)
class TransformerBenchmark(ModelBenchmark):
    """``fastattn.models.LanguageModel`` by the fused kernels and by plain PyTorch."""

    op: ClassVar[str] = "transformer"
    contenders: ClassVar[tuple[str, ...]] = (OURS, NAIVE)
    vocabulary: ClassVar[int] = 256

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.batch, "S": self.length, "E": WIDTH, "layers": LAYERS}

    def model(self, contender: str) -> Any:
        from ..models import LanguageModel, TransformerConfig

        torch.manual_seed(0)
        return LanguageModel(
            TransformerConfig(
                vocab_size=self.vocabulary,
                max_len=self.length + self.new_tokens,
                d_model=WIDTH,
                n_heads=HEADS,
                n_layers=LAYERS,
                attention="fused" if contender == OURS else "naive",
            )
        )

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens)

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        from ..models import cross_entropy

        return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    def generate(self, model: Any, tokens: Tensor) -> object:
        return model.generate(tokens, self.new_tokens, do_sample=False)


BENCHMARKS = (
    TransformerBenchmark("train_step", batch=2, length=1024),
    TransformerBenchmark("train_step", batch=1, length=4096, quick=False),
    TransformerBenchmark("generate", batch=1, length=1024, new_tokens=24),
    TransformerBenchmark("generate", batch=4, length=4000, new_tokens=24, quick=False),
)
