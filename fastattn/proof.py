"""Prove backends against the reference: what `fastattn check` does, and every benchmark first.

A case is proved by running it, forward and backward, and holding all it returns to the error law of
`fastattn.testing`.

As a program (`python -m fastattn.proof`, a target as JSON on stdin) it proves one backend over the
case table and prints a line of JSON a case: `fastattn check` runs one such process for each
instruction set, since a process loads only one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import child, dispatch, testing
from .backends import BACKENDS
from .cases import CASES, DTYPES, AttentionCase, Case, Inputs, LayerNormCase, SoftmaxCase
from .console import BAD, BOLD, DIM, GOOD, Cell, Console
from .ops.attention import attention, explain

LARGE = 2**23  # scores beyond which only some of the heads are looked at
SHOWN = 20  # failures, before it says how many more there are
OPS = ("attention", "layer_norm", "softmax")


@dataclass(frozen=True)
class Verdict:
    case: str
    op: str
    backend: str = ""
    problem: str = ""  # why the case failed
    refusal: str = ""  # why the backend does not serve it: no failure

    @property
    def passed(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class Target:
    """A backend to prove, and for `cpu` the instruction set to force."""

    backend: str
    isa: str = ""
    op: str | None = None
    every_dtype: bool = True  # or float32 and bfloat16 alone

    def __str__(self) -> str:
        return f"{self.backend} {self.isa}".strip()

    def cases(self) -> Iterator[Case]:
        dtypes = DTYPES if self.every_dtype else DTYPES[:2]
        for case in CASES:
            if self.op in (None, case.op):
                yield from (case.with_dtype(dtype) for dtype in dtypes)


def served_by(case: Case, backend: str | None, inputs: Inputs) -> tuple[str, list[str]]:
    """Who runs the case, and why the named backend does not."""
    if isinstance(case, AttentionCase):
        answer = explain(**inputs, **case.options)  # type: ignore[arg-type]
    else:
        x = inputs["x"]
        flags = ("dropout",) if case.dropout_p else ()
        learns = any(t.requires_grad for t in inputs.values())
        request = dispatch.Request(case.op, x.device, x.dtype, (x.shape,), flags, learns)
        answer = dispatch.explain(None, request)
    if backend is None:
        return answer.backend, []
    return backend, answer.reasons[backend]


def prove(
    case: Case, backend: str | None = None, backward: bool = True, device: str | None = None
) -> Verdict:
    """The whole case, or a sample of its heads where the oracle would need gigabytes; by default
    on the device where the backend is at home."""
    device = device or ("cpu" if backend is None else BACKENDS[backend].device)
    inputs = case.make_inputs(device=device, requires_grad=backward)
    name, refusals = served_by(case, backend, inputs)
    verdict = {"case": str(case), "op": case.op, "backend": name}
    if refusals:
        return Verdict(**verdict, refusal="; ".join(refusals))
    try:
        _hold_to_law(case, backend, inputs, backward)
    except Exception as error:  # a crash of a case is a finding about that case
        text = str(error).strip() or type(error).__name__
        return Verdict(**verdict, problem=text.splitlines()[0])
    return Verdict(**verdict)


def _hold_to_law(case: Case, backend: str | None, inputs: Inputs, backward: bool) -> None:
    if isinstance(case, AttentionCase) and _by_heads(case):
        _check_some_heads(case, backend, inputs, backward)
        return
    device = next(iter(inputs.values())).device

    def draw(n: int) -> testing.Comparison:
        drawn = case.make_inputs(n, device, requires_grad=backward) if n else inputs
        return _compare(case, backend, drawn, backward)

    testing.over_draws(draw)


def _compare(case: Case, backend: str | None, inputs: Inputs, backward: bool) -> testing.Comparison:
    if isinstance(case, AttentionCase):
        options = {k: v for k, v in case.options.items() if k != "return_lse"}
        return testing.compare_attention(backend, backward=backward, **inputs, **options)  # type: ignore[arg-type]
    if isinstance(case, LayerNormCase):
        keywords: dict[str, Any] = {n: inputs.get(n) for n in ("weight", "bias", "residual")}
        if case.residual:
            keywords["dropout_p"] = case.dropout_p
        return testing.compare_layer_norm(
            backend,
            inputs["x"],
            case.normalized_shape,
            rms=case.rms,
            backward=backward,
            eps=case.eps,
            **keywords,
        )
    if isinstance(case, SoftmaxCase):
        return testing.compare_softmax(
            backend,
            inputs["x"],
            case.dim,
            log=case.log,
            mask=inputs.get("mask"),
            backward=backward,
            scale=case.scale,
            dtype=case.out_dtype,
        )
    raise TypeError(f"no proof of {type(case).__name__}")


def _by_heads(case: AttentionCase) -> bool:
    """Whether the case is large, and made of tensors that have dims of batch and heads to slice."""
    s = case.shape
    large = s["B"] * s["H"] * s["M"] * s["N"] > LARGE
    sliceable = not case.alibi and not case.sinks and (not case.bias or case.bias_shape == "1hqk")
    return large and sliceable and s["B"] * s["K"] > 1


def _check_some_heads(
    case: AttentionCase, backend: str | None, inputs: Inputs, backward: bool
) -> None:
    """Run the call as it is, and hold its first and its last KV head to the law.

    Heads and batches do not influence one another, so the oracle needs no more than the head
    itself. Dropout depends on their numbers: there it is the first alone.
    """
    options = {**case.options, "return_lse": True}
    s = case.shape
    group = s["H"] // s["K"]
    cotangents = None
    if backward:
        generator = torch.Generator().manual_seed(1)
        rows = (s["B"], s["H"], s["M"])
        cotangents = tuple(
            torch.randn(shape, generator=generator).to(inputs["q"].device, case.dtype)
            for shape in ((*rows, s["E"]), rows)
        )

    def results(function, tensors, gradients, **more):  # type: ignore[no-untyped-def]
        def call(**arguments: Tensor) -> object:
            return function(**arguments, **options, **more)

        return testing.run(call, tensors, gradients, ("out", "lse"))

    got = results(attention, inputs, cotangents, backend=backend)
    places = {(0, 0)} if case.dropout_p else {(0, 0), (s["B"] - 1, s["K"] - 1)}
    for batch, head in places:
        queries, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)

        def part(
            x: Tensor, name: str, batch: int = batch, queries: slice = queries, keys: slice = keys
        ) -> Tensor:
            own = x if x.shape[0] == 1 else x[batch : batch + 1]
            return own[:, keys if name in ("k", "v", "dk", "dv") else queries]

        tensors = {
            name: part(x, name).detach().requires_grad_(x.requires_grad)
            for name, x in inputs.items()
        }
        slices = None if cotangents is None else tuple(part(g, "out") for g in cotangents)
        wide = testing.cast(tensors, torch.float64)  # type: ignore[arg-type]
        exact = results(attention, wide, slices, backend="reference")
        naive = results(testing.naive_attention, tensors, slices)
        testing.assert_laws({name: part(x, name) for name, x in got.items()}, naive, exact)


# ------------------------------------------------------------------------------- fastattn check


def targets(op: str | None, backend: str | None) -> list[Target]:
    """Every backend that runs here, the CPU's once for each instruction set.

    The reference, which the others are held against, only if it is named or alone. Instruction sets
    that would not be chosen here are proved in two dtypes, to stay under a minute.
    """
    from .bench import machine

    found = []
    for name, candidate in BACKENDS.items():
        if backend not in (None, name) or candidate.unavailable() is not None:
            continue
        isas = machine.build_record()["usable"] if name == "cpu" else [""]
        found += [Target(name, isa, op, isa == isas[0]) for isa in isas]
    kernels = [target for target in found if target.backend != "reference"]
    return kernels or found


def verdicts(target: Target) -> Iterator[Verdict]:
    """From a process of its own; if that process dies, the case it was at has failed."""
    environment = dict(os.environ)
    if target.isa:
        environment["FASTATTN_CPU_ISA"] = target.isa
    waiting = list(target.cases())
    try:
        for answer in child.answers("fastattn.proof", asdict(target), environment):
            waiting.pop(0)
            yield Verdict(**answer)
    except child.ChildError as error:
        name, op = (str(waiting[0]), waiting[0].op) if waiting else ("the end", target.op or OPS[0])
        yield Verdict(name, op, target.backend, problem=str(error))


def check(console: Console, op: str | None, backend: str | None, verbose: bool) -> int:
    """Prove every target, show a table; 1 if anything failed or there was nothing to prove."""
    if backend is not None and backend not in BACKENDS:
        console.line(f"fastattn check: unknown backend {backend!r}: {', '.join(BACKENDS)}", BAD)
        return 2
    planned = targets(op, backend)
    if not planned:
        reason = BACKENDS[backend].unavailable() if backend else "no backend runs here"
        console.line(f"fastattn check: nothing to prove: {reason}", BAD)
        return 1
    started = time.monotonic()
    rows: list[list[Cell]] = []
    problems: list[tuple[Target, Verdict]] = []
    ops = [name for name in OPS if op in (None, name)]
    with console.progress(sum(1 for t in planned for _ in t.cases()), "check") as advance:
        for target in planned:
            begun = time.monotonic()
            found = []
            for verdict in verdicts(target):
                advance(f"{target}: {verdict.case}")
                found.append(verdict)
                if verbose:
                    state = verdict.problem or verdict.refusal or "ok"
                    console.line(f"{target}  {verdict.case}: {state}")
            problems += [(target, v) for v in found if not v.passed]
            cells = [_count([v for v in found if v.op == name]) for name in ops]
            rows.append([str(target), *cells, f"{time.monotonic() - begun:.1f} s"])
    console.table("Proved against float64: cases passed", ("backend", *ops, "time"), rows)
    for name, candidate in BACKENDS.items():
        reason = candidate.unavailable()
        if reason and backend is None:
            console.line(f"not here: {name}: {reason}", DIM)
    for target, verdict in problems[:SHOWN]:
        console.line(f"FAILED {target}  {verdict.case}: {verdict.problem}", BAD)
    if len(problems) > SHOWN:
        console.line(f"and {len(problems) - SHOWN} more: --verbose shows them all", DIM)
    state = f"{len(problems)} cases failed" if problems else "all passed"
    console.line(f"{state}, in {time.monotonic() - started:.0f} s", BAD if problems else BOLD)
    return 1 if problems else 0


def _count(found: list[Verdict]) -> Cell:
    served = [v for v in found if not v.refusal]
    passed = sum(v.passed for v in served)
    text = f"{passed}/{len(served)}"
    if len(served) < len(found):
        text += f" ({len(found) - len(served)} not served)"
    return text, GOOD if passed == len(served) else BAD


def main() -> None:
    target = Target(**json.load(sys.stdin))
    for case in target.cases():
        print(json.dumps(asdict(prove(case, target.backend))), flush=True)


if __name__ == "__main__":
    main()
