"""A whole model as a benchmark: a training step, and the making of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .timing import Call


@dataclass(frozen=True)
class ModelBenchmark(ABC):
    """One line of the report, times and peak memory.

    direction: "train_step" (forward, loss, backward, AdamW) or "generate" (greedy, KV cache).
    """

    direction: str
    batch: int
    length: int  # tokens trained on, or in the prompt
    new_tokens: int = 0
    quick: bool = True
    dtype: str = "float32"
    goal: float | None = None  # the time of the fastest of the others over ours

    op: ClassVar[str]
    contenders: ClassVar[tuple[str, ...]]

    @property
    def id(self) -> str:
        return f"{self.op}-b{self.batch}_s{self.length}-{self.dtype}-{self.direction}"

    @property
    def tokens(self) -> int:
        """What one call works off."""
        return self.batch * (self.new_tokens or self.length)

    @property
    @abstractmethod
    def shape(self) -> dict[str, int]:
        """For the report."""

    def unavailable(self) -> str:
        """Why it cannot run here, or ""."""
        return ""

    @abstractmethod
    def model(self, contender: str) -> Any:
        """The model as this contender runs it."""

    def models(self) -> dict[str, Any]:
        """Everyone's model, all with one set of weights in memory: where weights lie decides as
        much of a token's time as who computes it."""
        made = {name: self.model(name) for name in self.contenders}
        weights = next(iter(made.values())).state_dict(keep_vars=True)
        for model in made.values():
            model.load_state_dict(weights, assign=True)
        return made

    @abstractmethod
    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S, vocabulary)"""

    @abstractmethod
    def loss(self, model: Any, tokens: Tensor) -> Tensor:
        """Of predicting each token from those before it."""

    @abstractmethod
    def generate(self, model: Any, tokens: Tensor) -> object:
        """``new_tokens`` more, one by one."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens there are."""

    def make_tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocabulary, (self.batch, self.length), generator=generator)

    def call(self, model: Any, tokens: Tensor) -> Call:
        """What is timed."""
        if self.new_tokens:
            model.eval()
            return lambda: self.generate(model, tokens)
        return self.stepper(model)(tokens)

    def stepper(self, model: Any) -> Callable[[Tensor], Call]:
        """Training steps with one optimizer, on tokens of any length."""
        model.train()
        # Fused: else the optimizer's passes over the weights, which are the same for everyone,
        # take a fifth of a step of GPT-2.
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def step(tokens: Tensor) -> object:
            loss = self.loss(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return lambda tokens: lambda: step(tokens)
