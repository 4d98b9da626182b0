"""transformers' GPT-2, patched, against its own "sdpa" (torch's operator) and "eager" (naive)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .contenders import NAIVE, OURS, TORCH
from .whole_model import ModelBenchmark


@dataclass(frozen=True)
class Gpt2Benchmark(ModelBenchmark):
    """``GPT2LMHeadModel`` of GPT-2 small's shape with random weights, in float32, no dropout."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257

    op: ClassVar[str] = "gpt2"
    contenders: ClassVar[tuple[str, ...]] = (OURS, TORCH, NAIVE)

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.batch, "S": self.length, "E": self.width, "layers": self.layers}

    def unavailable(self) -> str:
        try:
            import transformers
        except ImportError:
            return "transformers is not installed: pip install 'fastattn[transformers]'"
        if int(transformers.__version__.partition(".")[0]) < 5:
            return f"expected transformers 5 or later, got {transformers.__version__}"
        return ""

    def model(self, contender: str) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        from ..patching import patch

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=self.vocabulary,
            n_layer=self.layers,
            n_embd=self.width,
            n_head=self.heads,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",  # type: ignore[call-arg]
        )
        config._attn_implementation = "eager" if contender == NAIVE else "sdpa"
        model = GPT2LMHeadModel(config)
        if contender == OURS:
            patch(model)
        return model

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits

    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    def generate(self, model: Any, tokens: Tensor) -> object:
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )


BENCHMARKS = (
    Gpt2Benchmark("train_step", batch=1, length=512, quick=False, goal=1.0),
    Gpt2Benchmark("train_step", batch=1, length=1024, quick=False, goal=1.0),
    Gpt2Benchmark("generate", batch=1, length=512, new_tokens=32, quick=False, goal=1.0),
    Gpt2Benchmark("generate", batch=1, length=960, new_tokens=32, quick=False, goal=1.0),
)
