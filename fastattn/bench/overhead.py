"""What a call of the Triton backend costs on the host: without a GPU up to the launch, with one all
of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ..backends import triton as backend

ROUNDS, CALLS = 15, 40

Call = Callable[[], Any]


class Cost(NamedTuple):
    """Microseconds of one call on the host."""

    ours: float  # from the public function to the launch, and back
    triton: (
        float  # Triton's own, in the launch: it types the arguments and finds the compiled kernel
    )

    def __str__(self) -> str:
        return f"{self.ours:.0f} us, and {self.triton:.0f} us of Triton's own up to the driver"


def host_microseconds() -> dict[str, Cost]:
    """By what is called, on tensors of the CPU that nobody computes with: a launch does nothing.
    Empty where triton is not installed or is an interpreter."""
    if backend.INTERPRETED or find_spec("triton") is None:
        return {}
    from ..backends.triton.kernel import Launch

    launched: list[Launch] = []
    with ExitStack() as stack:
        for owner, name, replacement in (
            (Launch, "run", launched.append),
            (backend.TritonBackend, "unavailable", lambda self: None),
            (backend.TritonBackend, "reasons", lambda self, request: []),
        ):
            stack.enter_context(mock.patch.object(owner, name, _method(replacement)))
        calls = dict(_calls("cpu", "triton"))
        costs = {}
        for name, call in calls.items():
            ours = _cost(call)
            launched.clear()
            call()
            costs[name] = Cost(ours, sum(map(_binding, launched)))
    return costs


def launch_microseconds(device: torch.device, name: str | None) -> dict[str, float]:
    """The same calls by backend ``name`` on a GPU, launches and all; what they compute is small,
    and not waited for."""
    costs = {}
    for called, call in _calls(device, name):
        call()
        torch.cuda.synchronize(device)
        costs[called] = _cost(call)
        torch.cuda.synchronize(device)
    return costs


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method, such as a list's, does not bind the instance by itself."""
    return lambda *arguments: function(*arguments)


def _calls(device: str | torch.device, name: str | None) -> Iterator[tuple[str, Call]]:
    """The public functions, and their backwards by autograd."""
    import fastattn

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True)

    q, k, v = (zeros(2, 8, 256, 64) for _ in range(3))
    x, weight, bias = zeros(512, 1024), zeros(1024), zeros(1024)
    functions: dict[str, tuple[Call, list[Tensor]]] = {
        "attention": (lambda: fastattn.attention(q, k, v, causal=True, backend=name), [q, k, v]),
        "layer_norm": (
            lambda: fastattn.layer_norm(x, (1024,), weight, bias, backend=name),
            [x, weight, bias],
        ),
        "softmax": (lambda: fastattn.softmax(x, backend=name), [x]),
    }
    for called, (forward, leaves) in functions.items():
        out = forward()
        dout = torch.zeros_like(out)
        yield called, forward
        backward = partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
        yield f"{called} backward", backward


def _binding(launch: Any) -> float:
    """What Triton does in a launch before it calls the driver, for which no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import compute_cache_key, create_function_from_signature

    function = launch.function
    target = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(function.signature, function.params, target)
    arguments, cache = launch.keywords(), {}  # type: ignore[var-annotated]

    def bind() -> None:
        _, specialization, options = binder(**arguments)
        compute_cache_key(cache, specialization, options)

    return _cost(bind)


def _cost(call: Call) -> float:
    """Microseconds, the fastest of several rounds: what disturbs only adds."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / CALLS * 1e6
