"""What the cuda backend says of calls that it has no kernel for, or that no device could hold."""

import pytest
import torch

from fastattn import dispatch
from fastattn.dispatch import Request

BACKEND = dispatch.BACKENDS["cuda"]


def reasons(op="attention", dtype=torch.bfloat16, flags=(), needs_backward=False, **sizes):
    sizes = {"batch": 2, "heads": 4, "q_len": 128, "k_len": 256, "dim": 64, "v_dim": 64} | sizes
    batch, heads, q_len, k_len, dim, v_dim = sizes.values()
    lengths = ((q_len, dim), (k_len, dim), (k_len, v_dim))
    shapes = tuple(torch.Size((batch, heads, *last)) for last in lengths)
    return BACKEND.reasons(
        Request(op, torch.device("cpu"), dtype, shapes, flags, needs_backward=needs_backward)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": 256},
        {"needs_backward": True},
        {"q_len": 2**30, "k_len": 2**30},
        {"batch": 2**12, "heads": 2**12},
        {"op": "softmax", "dtype": torch.float32, "q_len": 2**40},  # read twice
        {"op": "layer_norm", "batch": 2**20, "dim": 2**30},
    ],
    ids=str,
)
def test_served(fields):
    assert reasons(**fields) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": torch.float32}, "serves attention in bfloat16 and float16 (got torch.float32)"),
        ({"dim": 257}, "serves head dims up to 256 (got 257)"),
        ({"v_dim": 320}, "serves head dims up to 256 (got 320)"),
        ({"k_len": 2**30 + 1}, "serves up to 1073741824 queries and keys (got 1073741825)"),
        (
            {"batch": 64, "q_len": 2**28},
            "needs 2147483648 tiles (a launch has up to 2147483647)",
        ),
        (
            {"k_len": 2**20, "needs_backward": True, "flags": ("bias",)},
            "needs 8589934592 tiles (a launch has up to 2147483647)",
        ),
        (
            {"op": "softmax", "dtype": torch.float64},
            "serves float32, bfloat16 and float16 (got torch.float64)",
        ),
    ],
    ids=str,
)
def test_refused(fields, expected):
    assert reasons(**fields) == [expected]


def test_a_device_with_less_shared_memory_serves_smaller_head_dims(monkeypatch):
    monkeypatch.setattr(BACKEND, "_emulated_limits", (64 << 10, 3, 80))
    assert reasons(dim=64) == []
    (reason,) = reasons(dim=256)
    assert "head dim 256 needs" in reason and "here are 65536" in reason
