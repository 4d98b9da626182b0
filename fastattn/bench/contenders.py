"""Who runs in a benchmark: ours, naive PyTorch, torch's fused operator, FlexAttention."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cases import AttentionCase, Case, Inputs
from . import naive
from .table import Benchmark
from .timing import Call

OURS, TORCH, NAIVE, FLEX = "ours", "torch", "naive", "flex"
GUESTS = frozenset((NAIVE, FLEX))  # timed for a few rounds only


@dataclass
class Contenders:
    """What to time, and why somebody is missing."""

    calls: dict[str, Call] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def forwards(case: Case, inputs: Inputs, backend: str | None) -> dict[str, Callable[[], Tensor]]:
    """The forward of everyone but FlexAttention."""
    calls: dict[str, Callable[[], Tensor]] = {OURS: lambda: case.run(inputs, backend)[0]}
    peer = case.torch_peer(inputs)
    if peer is not None:
        calls[TORCH] = peer
    calls[NAIVE] = lambda: naive.run(case, inputs)
    return calls


def make(benchmark: Benchmark, backend: str | None, flex: bool) -> Contenders:
    """Every contender of a benchmark as a function of nothing, on inputs of its own case."""
    case = benchmark.case
    learns = benchmark.direction != "forward"
    inputs = case.make_inputs(requires_grad=learns)
    contenders = Contenders()
    for name, forward in forwards(case, inputs, backend).items():
        contenders.calls[name] = _timed(benchmark, forward, inputs)
    if flex and benchmark.flex and isinstance(case, AttentionCase):
        if learns:
            contenders.absent[FLEX] = "FlexAttention has no backward on CPU"
        else:
            try:
                contenders.calls[FLEX] = _no_grad(_flex_attention(case, inputs))
            except Exception as error:  # whatever the compiler stumbles over is its reason
                line = (str(error).strip().splitlines() or [""])[0]
                contenders.absent[FLEX] = f"{type(error).__name__}: {line[:160]}"
    return contenders


def _timed(benchmark: Benchmark, forward: Callable[[], Tensor], inputs: Inputs) -> Call:
    if benchmark.direction == "forward":
        return _no_grad(forward)
    if benchmark.direction == "call":
        return forward
    leaves = [inputs[name] for name in benchmark.case.differentiable]
    if benchmark.direction == "call_backward":
        gradient = torch.ones_like(forward())
        return lambda: torch.autograd.grad(forward(), leaves, gradient)
    return Backward(forward, leaves)


class Backward:
    """The backward alone. The graph is built at the first call, which the timer throws away."""

    def __init__(self, forward: Callable[[], Tensor], leaves: list[Tensor]):
        self.forward, self.leaves = forward, leaves
        self.out: Tensor | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        if self.out is None:
            self.out = self.forward()
            generator = torch.Generator().manual_seed(1)
            noise = torch.randn(self.out.shape, generator=generator)
            self.gradient = noise.to(self.out)
        return torch.autograd.grad(self.out, self.leaves, self.gradient, retain_graph=True)


def _no_grad(forward: Callable[[], Tensor]) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return forward()

    return call


def _flex_attention(case: AttentionCase, inputs: Inputs) -> Callable[[], Tensor]:
    """A compiled FlexAttention, compiled: the first call happens here."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    mask = None
    if case.causal:
        shift = k.shape[2] - q.shape[2]

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i + shift >= j

        mask = create_block_mask(sees, None, None, q.shape[2], k.shape[2], device=str(q.device))
    compiled = torch.compile(flex_attention)

    def call() -> Tensor:
        return compiled(q, k, v, block_mask=mask, scale=case.scale)

    with torch.no_grad():
        call()
    gc.collect()
    return call
