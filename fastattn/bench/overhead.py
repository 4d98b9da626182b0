"""What a call of the Triton backend costs on the host, up to the launch: no GPU is needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

from .. import library
from ..backends import triton as backend

ROUNDS, CALLS = 15, 40


def host_microseconds() -> dict[str, float]:
    """By what is called: from the op to the launch, which is left out: outputs, strides, the choice
    of a configuration, the arguments. Empty where triton is not installed or is an interpreter."""
    if backend.INTERPRETED or find_spec("triton") is None:
        return {}
    from ..backends.triton.kernel import Launch

    with mock.patch.object(Launch, "run", lambda self: None):
        return {name: _cost(call) for name, call in _calls().items()}


def _calls() -> dict[str, Callable[[], Any]]:
    """On tensors of the CPU, which nobody computes with."""
    q = torch.zeros(2, 8, 256, 64, dtype=torch.bfloat16)
    lse = torch.zeros(2, 8, 256)
    x, weight = (
        torch.zeros(512, 1024, dtype=torch.bfloat16),
        torch.zeros(1024, dtype=torch.bfloat16),
    )
    rows = torch.zeros(512)
    attention = (q, q, q, None, None, None, None, 0.125, 0.0, -1, 0, 0, 0.0, "triton")
    norm = (weight, weight, None, 1024, 1e-5, False, 0.0, "triton")
    needs = [True, True, True, False, False]
    return {
        "attention": lambda: library.attention_forward.run(*attention),
        "attention backward": lambda: library.attention_backward.run(
            q, None, q, lse, lse, needs, *attention
        ),
        "layer_norm": lambda: library.layer_norm_forward.run(x, None, *norm),
        "layer_norm backward": lambda: library.layer_norm_backward.run(
            x, None, x, rows, rows, [True, False, True, True], False, *norm
        ),
        "softmax": lambda: library.softmax_forward.run(x, 1, None, 1.0, False, x.dtype, "triton"),
        "softmax backward": lambda: library.softmax_backward.run(
            x, x, 1, 1.0, False, x.dtype, "triton"
        ),
    }


def _cost(call: Callable[[], Any]) -> float:
    """Microseconds, the fastest of several rounds: what disturbs only adds."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / CALLS * 1e6
