"""`fastattn tune`: measures alternatives to the heuristics on this machine, and keeps what wins.

A problem is a kernel at a shape that decides its configuration. Its candidates are timed, the one
in use among them, and what is faster by more than the noise goes into the file that ``tuned.py``
reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...console import BAD, BOLD, DIM, GOOD, Cell, Console
from ..base import AttentionCall, LayerNormCall, SoftmaxCall, empty_output
from . import INTERPRETED, attention_backward, attention_forward, layer_norm, row_config, softmax
from .attention_config import Config, attention_problem, backward_config, forward_config
from .kernel import Launch, architecture
from .row_config import RowConfig, row_problem
from .tuned import Table, cache_file, machine_key, write

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GAIN = 0.03  # of the time; less is noise
NUMBERS = 2**26  # of the tensors of layer norm and softmax
WIDTHS = (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
HEAD_DIMS = (64, 128, 256)

Alternatives = Callable[[Any], list[Any]]  # to the best configuration so far


class Problem(NamedTuple):
    kernel: str
    key: str
    default: Any  # what the heuristics say
    steps: list[Alternatives]  # searched one after the other
    launches: Callable[[Any], list[Launch]]  # of a configuration


# ------------------------------------------------------------------------------------- problems


def problems(device: torch.device, op: str | None) -> Iterator[Problem]:
    for dtype in DTYPES:
        for width in WIDTHS:
            x = torch.randn(NUMBERS // width, width, device=device, dtype=dtype)
            if op in (None, "layer_norm"):
                yield from layer_norm_problems(x)
            if op in (None, "softmax"):
                yield from softmax_problems(x)
        for head_dim in HEAD_DIMS:
            if op in (None, "attention"):
                q = torch.randn(2, 16, 4096, head_dim, device=device, dtype=dtype)
                yield from attention_problems(q)


def row_alternatives(best: RowConfig) -> list[RowConfig]:
    """Half and twice as many rows at a time and warps; other blocks, where rows are looped."""
    scales = (0.5, 1, 2)
    most = 1024 // (64 if torch.version.hip else 32)
    found = (
        RowConfig(max(1, int(best.block_rows * a)), int(best.block_width * b), warps, best.looped)
        for a in scales
        for b in (scales if best.looped else (1,))
        for warps in sorted({max(1, min(int(best.num_warps * c), most)) for c in scales})
    )
    return list(dict.fromkeys(found))


def layer_norm_problems(x: Tensor) -> Iterator[Problem]:
    arch, (rows, width) = architecture(x.device), x.shape
    weight, y = x[0].clone(), torch.empty_like(x)
    mean, rstd = x.new_zeros((2, rows), dtype=torch.float32)
    call = LayerNormCall(x, None, weight, weight, None, width, 1e-5, False, 0.0)
    outputs, grads = (y, None, mean, rstd), (y, None, weight.clone(), weight.clone())
    steps: list[Alternatives] = [row_alternatives]

    default = row_config.layer_norm_config(arch, x.dtype, width, rows)
    yield Problem(
        "layer_norm_forward",
        row_problem(x.dtype, default),
        default,
        steps,
        lambda config: [layer_norm.forward_launch(call, outputs, arch, config)],
    )
    default = row_config.layer_norm_backward_config(arch, width, rows)
    yield Problem(
        "layer_norm_backward",
        row_problem(x.dtype, default),
        default,
        steps,
        lambda config: layer_norm.backward_launches(
            call, x, (mean, rstd), (x, None), grads, arch, config
        ),
    )


def softmax_problems(x: Tensor) -> Iterator[Problem]:
    arch, sizes = architecture(x.device), (1, 1, *x.shape, 1)
    y = torch.empty_like(x)
    call = SoftmaxCall(x, 1, None, 1.0, False, x.dtype)
    steps: list[Alternatives] = [row_alternatives]

    default = row_config.softmax_config(arch, sizes)
    yield Problem(
        "softmax_forward",
        row_problem(x.dtype, default),
        default,
        steps,
        lambda config: [softmax.forward_launch(call, y, arch, config)],
    )
    default = row_config.softmax_config(arch, sizes, backward=True)
    yield Problem(
        "softmax_backward",
        row_problem(x.dtype, default),
        default,
        steps,
        lambda config: [softmax.backward_launch(x, x, y, 1, 1.0, False, arch, config)],
    )


def attention_alternatives(best: Config, specialize: bool = False) -> list[Config]:
    """Tiles, warps and stages; then, beside plain addresses, tensor descriptors and specialised
    warps, which a tensor or a version without them ignores."""
    ways = [(False, False), (True, False), (True, True)] if specialize else [(best.tma, False)]
    sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))
    return [Config(*numbers, *way) for numbers in sizes for way in ways]


def attention_problems(q: Tensor) -> Iterator[Problem]:
    """Causal self-attention; the configuration does not depend on the mask."""
    arch, length, head_dim = architecture(q.device), q.shape[2], q.shape[3]
    scale = head_dim**-0.5
    call = AttentionCall(q, q, q, None, None, None, None, scale, 0.0, -1, 0, 0, 0.0)
    out = empty_output(q, head_dim)
    lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
    special = q.dtype is not torch.float32
    yield Problem(
        "attention_forward",
        attention_problem(q.dtype, head_dim, head_dim, length, special),
        forward_config(arch, q.dtype, head_dim, head_dim, length, length, special),
        [lambda best: attention_alternatives(best, specialize=True)],
        lambda config: attention_forward.forward_launches(call, out, lse, arch, config),
    )

    def backward(config: Any) -> list[Launch]:
        needs = (True, True, True, False, False)
        plan = attention_backward.BackwardPlan(call, q, None, out, lse, needs, arch, config)
        return plan.launches

    yield Problem(
        "attention_backward",
        attention_problem(q.dtype, head_dim, head_dim, length),
        backward_config(arch, q.dtype, head_dim, head_dim, length, length),
        [
            lambda best: [best._replace(dq=c) for c in attention_alternatives(best.dq)],
            lambda best: [best._replace(dkdv=c) for c in attention_alternatives(best.dkdv)],
        ],
        backward,
    )


# --------------------------------------------------------------------------------------- search


def milliseconds(launches: list[Launch]) -> float:
    """The median, by triton's own stopwatch, which clears the cache before each run."""
    from triton.testing import do_bench

    def run() -> None:
        for launch in launches:
            launch.start(launch.num_stages)

    return do_bench(run, warmup=10, rep=50, return_mode="median")


def search(
    problem: Problem, measure: Callable[[list[Launch]], float] = milliseconds
) -> tuple[Any, float, float]:
    """(the fastest configuration, its time, the time of the default)."""
    best, before = problem.default, measure(problem.launches(problem.default))
    time = before
    for alternatives in problem.steps:
        for candidate in alternatives(best):
            try:
                took = measure(problem.launches(candidate))
            except Exception:  # too much shared memory, or more than this compiler can do
                continue
            if took < time:
                best, time = candidate, took
    return best, time, before


def tune(console: Console, op: str | None) -> int:
    """Searches every problem, shows what it gained and keeps it; 1 if it cannot be kept."""
    if INTERPRETED:
        console.line("fastattn tune: the time of the interpreter says nothing of a GPU", BAD)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[list[Cell]] = []
    table: Table = {}
    count = len(DTYPES) * sum(
        2 * n
        for name, n in (
            ("layer_norm", len(WIDTHS)),
            ("softmax", len(WIDTHS)),
            ("attention", len(HEAD_DIMS)),
        )
        if op in (None, name)
    )
    with console.progress(count, "tune") as advance:
        for problem in problems(device, op):
            advance(f"{problem.kernel}, {problem.key}")
            best, time, before = search(problem)
            if time < before * (1 - GAIN):
                table.setdefault(problem.kernel, {})[problem.key] = best
                gain: Cell = (f"{before / time:.2f} x", GOOD)
            else:
                gain = "as it was"
            rows.append([problem.kernel, problem.key, f"{before:.3f}", f"{time:.3f}", gain])
    console.table(
        f"Tuned for {machine_key(device)}, milliseconds",
        ("kernel", "problem", "heuristics", "best", "gain"),
        rows,
    )
    if reason := write(machine_key(device), table):
        console.line(f"fastattn tune: cannot write {cache_file()}: {reason}", BAD)
        return 1
    console.line(f"kept in {cache_file()}, and used from the next process on", BOLD)
    console.line("delete the file to go back to the heuristics", DIM)
    return 0
