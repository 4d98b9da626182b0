"""Who runs in a benchmark: ours, naive PyTorch, torch's fused operator, FlexAttention; on a GPU
ours and its peers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cases import AttentionCase, Case, Inputs
from ..spec import AttentionSpec
from . import naive, peers
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


def make(benchmark: Benchmark, backend: str | None, flex: bool, device: str = "cpu") -> Contenders:
    """Every contender of a benchmark as a function of nothing, on inputs of its own case."""
    if benchmark.gpu:
        return _make_on_gpu(benchmark, backend, device)
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
                contenders.absent[FLEX] = _reason(error)
    return contenders


def _make_on_gpu(benchmark: Benchmark, backend: str | None, device: str) -> Contenders:
    """Ours and every peer that runs: each is called once, as it will be timed."""
    case = benchmark.case
    inputs = case.make_inputs(device=device, requires_grad=benchmark.direction != "forward")
    contenders = Contenders()
    contenders.calls[OURS] = _timed(benchmark, lambda: case.run(inputs, backend)[0], inputs)
    makers = peers.of(case, inputs)
    if benchmark.flex and isinstance(case, AttentionCase):
        makers[FLEX] = lambda: _flex_attention(case, inputs)
    for name, make_forward in makers.items():
        try:
            call = _timed(benchmark, make_forward(), inputs)
            call()
        except Exception as error:  # who cannot take part says why
            contenders.absent[name] = _reason(error)
        else:
            contenders.calls[name] = call
    return contenders


def _reason(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:160]
    return line if isinstance(error, peers.Absent) else f"{type(error).__name__}: {line}"


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
    left, right, shift = AttentionSpec.of(q, k, v, causal=case.causal, window=case.window).mask
    if left >= 0 or right >= 0:

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            near = i + shift >= j - right if right >= 0 else j >= 0
            return near & (i + shift <= j + left) if left >= 0 else near

        mask = create_block_mask(sees, None, None, q.shape[2], k.shape[2], device=str(q.device))
    compiled = torch.compile(flex_attention)

    def call() -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=grouped)

    with torch.no_grad():
        call()
    gc.collect()
    return call
