"""The reference Transformer, fused against naive: a training step, and the making of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import testing
from . import timing
from .contenders import NAIVE, OURS
from .results import Result

LAYERS, WIDTH, HEADS, VOCAB = 4, 256, 4, 256


@dataclass(frozen=True)
class TransformerBenchmark:
    """direction: "train_step" (forward, loss, backward, AdamW) or "generate" (greedy, KV cache)."""

    direction: str
    batch: int
    length: int  # tokens trained on, or in the prompt
    new_tokens: int = 0
    quick: bool = True
    op: str = "transformer"
    dtype: str = "float32"

    @property
    def id(self) -> str:
        return f"transformer-b{self.batch}_s{self.length}-{self.dtype}-{self.direction}"

    @property
    def tokens(self) -> int:
        """What one call works off."""
        return self.batch * (self.new_tokens or self.length)


BENCHMARKS = (
    TransformerBenchmark("train_step", batch=2, length=1024),
    TransformerBenchmark("train_step", batch=1, length=4096, quick=False),
    TransformerBenchmark("generate", batch=1, length=1024, new_tokens=24),
    TransformerBenchmark("generate", batch=4, length=4000, new_tokens=24, quick=False),
)


def models(benchmark: TransformerBenchmark) -> dict[str, Any]:
    """The same weights under the fused and under the naive kernels."""
    from ..models import LanguageModel, TransformerConfig

    made: dict[str, Any] = {}
    for name, attention in ((OURS, "fused"), (NAIVE, "naive")):
        torch.manual_seed(0)
        made[name] = LanguageModel(
            TransformerConfig(
                vocab_size=VOCAB,
                max_len=benchmark.length + benchmark.new_tokens,
                d_model=WIDTH,
                n_heads=HEADS,
                n_layers=LAYERS,
                attention=attention,
            )
        )
    return made


def tokens_of(benchmark: TransformerBenchmark) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (benchmark.batch, benchmark.length), generator=generator)


def check(made: dict[str, Any], tokens: Tensor) -> None:
    """Hold the fused logits to the error law: AssertionError if they are wrong."""
    prompt = tokens[:1, :512]
    with torch.no_grad():
        ours, naive = made[OURS](prompt), made[NAIVE](prompt)
        exact = made[NAIVE].double()(prompt)
        made[NAIVE].float()
    testing.assert_error_law("logits", ours, naive, exact)


def calls(
    benchmark: TransformerBenchmark, made: dict[str, Any], tokens: Tensor
) -> dict[str, timing.Call]:
    def step(model: Any) -> Callable[[], object]:
        from ..models import cross_entropy

        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def run() -> object:
            loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return run

    def generate(model: Any) -> Callable[[], object]:
        return lambda: model.generate(tokens, benchmark.new_tokens, do_sample=False)

    make = generate if benchmark.new_tokens else step
    return {name: make(model) for name, model in made.items()}


def run(benchmark: TransformerBenchmark, budget_s: float) -> Result:
    shape = {"B": benchmark.batch, "S": benchmark.length, "E": WIDTH, "layers": LAYERS}
    result = Result(
        id=benchmark.id,
        op=benchmark.op,
        kind=benchmark.direction,
        direction=benchmark.direction,
        dtype=benchmark.dtype,
        shape=shape,
    )
    try:
        made, tokens = models(benchmark), tokens_of(benchmark)
        check(made, tokens)
        result.checked = "error law passed"
        samples = timing.interleave(calls(benchmark, made, tokens), budget_s)
    except Exception as error:
        result.failure = f"{type(error).__name__}: {error}"
        return result
    for name, seconds in samples.items():
        result.times[name] = timing.Timing.of(seconds).to_json()
    result.ratios[NAIVE] = timing.ratio(samples[NAIVE], samples[OURS]).to_json()
    result.tokens = benchmark.tokens / result.times[OURS]["median"]
    return result
