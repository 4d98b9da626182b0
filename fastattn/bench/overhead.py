"""What a call costs on the host. The Triton backend's up to the driver, which needs no GPU; and
with a GPU all of it, by any backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ..backends import triton as backend
from ..console import Cell, Console

ROUNDS, CALLS = 60, 10  # a round is over before the scheduler would end it
MODULES = ("attention_forward", "attention_backward", "layer_norm", "softmax")

Call = Callable[[], Any]


class Cost(NamedTuple):
    """Microseconds of one call on the host, up to the driver."""

    ours: float  # from the public function to the launch, and back
    triton: float  # in the launches: Triton types the arguments and finds the compiled kernel
    launches: int


def show(console: Console, device: torch.device | None = None) -> None:
    """A table of calls; with a GPU as ``device`` its driver counts as well. Nothing where triton is
    not installed, or is an interpreter."""
    costs = host_microseconds()
    if not costs:
        return
    columns = ["call", "launches", "fastattn", "triton"]
    rows: list[list[Cell]] = [
        [name, str(cost.launches), f"{cost.ours:.0f}", f"{cost.triton:.0f}"]
        for name, cost in costs.items()
    ]
    if device:
        columns.append("with the driver")
        whole = launch_microseconds(device, "triton")
        for row, name in zip(rows, costs, strict=True):
            row.append(f"{whole[name]:.0f}")
    console.table("A call of the Triton backend on the host, microseconds", columns, rows)


def host_microseconds() -> dict[str, Cost]:
    """By what is called, on tensors of the CPU that nobody computes with: as for a GPU of sm_90,
    less the driver. Empty where triton is not installed, or is an interpreter."""
    if backend.INTERPRETED or find_spec("triton") is None:
        return {}
    from ..backends.triton.kernel import Launch

    costs = {}
    with without_a_driver():
        for name, call in _calls("cpu", "triton"):
            whole = _cost(call)
            launched: list[Launch] = []
            with mock.patch.object(Launch, "run", lambda self, to=launched: to.append(self)):
                call()
            triton = sum(map(_cost, map(_launching, launched)))
            costs[name] = Cost(whole - triton, triton, len(launched))
    return costs


def _launching(launch: Any) -> Call:
    """Triton's part of a launch alone."""
    return partial(launch.function[launch.grid], **launch.keywords(launch.num_stages))


class _Driver:
    """Stands in for Triton's: of a large GPU that is not there."""

    name = "a stopwatch's"  # Triton keeps the kernels of each device apart

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class _Kernel:
    """Stands in for a compiled one; ``launches`` are the arguments of each."""

    function = packed_metadata = None

    def __init__(self, launches: list[tuple[Any, ...]] | None) -> None:
        self.launches = launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        if self.launches is not None:
            self.launches.append(arguments)


@contextmanager
def without_a_driver(launches: list[tuple[Any, ...]] | None = None) -> Iterator[None]:
    """Within, the Triton backend takes tensors of the CPU and does all that it does for a GPU of
    sm_90, Triton's own part included, but nothing is compiled and nothing runs."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def found(self: Any, key: str, signature: Any, device: str, *_: Any) -> _Kernel:
        kernel = self.device_caches[device][0][key] = _Kernel(launches)
        return kernel

    everything: list[tuple[Any, str, Any]] = [
        (driver, "_active", _Driver()),
        (JITFunction, "_do_compile", found),
        (backend.TritonBackend, "unavailable", lambda self: None),
        (backend.TritonBackend, "reasons", lambda self, request: []),
    ]
    modules = [backend._module(name) for name in MODULES]
    machine = {"architecture": lambda device: "sm_90", "processors": lambda device: 132}
    everything += [(m, name, f) for m in modules for name, f in machine.items() if hasattr(m, name)]
    with ExitStack() as stack:
        for owner, name, replacement in everything:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


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


def _calls(device: str | torch.device, name: str | None) -> Iterator[tuple[str, Call]]:
    """The public functions, and their backwards by autograd; a decoded token, whose kernels take
    no longer than their launches."""
    import fastattn

    def zeros(*shape: int, learns: bool = True) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=learns)

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
    token, keys = zeros(1, 32, 1, 128, learns=False), zeros(1, 8, 1024, 128, learns=False)
    yield "decode", lambda: fastattn.attention(token, keys, keys, causal=True, backend=name)


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
