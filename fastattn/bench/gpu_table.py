"""What is benchmarked on a GPU, and the goal of each: against the fastest peer of the run, or as a
share of the device's own copy. The shapes have 16,384 tokens and a model width of 2048, as the
papers of FlashAttention have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..cases import AttentionCase, LayerNormCase, SoftmaxCase
from .table import Benchmark

TOKENS, WIDTH = 16384, 2048
NUMBERS = 2**26  # of the tensors of layer norm and softmax: more than any cache holds
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
NORM_WIDTHS = (1024, 2048, 4096, 8192, 16384)
SOFTMAX_WIDTHS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)


def _attention(
    kind: str, length: int, head_dim: int, dtype: torch.dtype = BF16, **changes: object
) -> AttentionCase:
    return AttentionCase(
        f"{kind}_s{length}_d{head_dim}",
        batch=TOKENS // length,
        heads=WIDTH // head_dim,
        q_len=length,
        head_dim=head_dim,
        causal=kind != "full",
        return_lse=False,
        dtype=dtype,
        **changes,  # type: ignore[arg-type]
    )


def _attention_forward_goal(kind: str, length: int, head_dim: int) -> float | None:
    if head_dim == 64 or (kind == "causal" and length <= 1024):
        return 1.10
    return 0.92 if length >= 2048 else None


def _attention_benchmarks() -> Iterator[Benchmark]:
    for head_dim in (128, 64):
        for kind in ("full", "causal"):
            for length in LENGTHS:
                case = _attention(kind, length, head_dim)
                quick = length in (1024, 4096, 16384)
                goal = _attention_forward_goal(kind, length, head_dim)
                yield Benchmark(kind, case, "forward", quick, flex=True, gpu=True, own_goal=goal)
                goal = 1.03 if head_dim == 128 and length >= 2048 else None
                yield Benchmark(kind, case, "backward", quick, flex=True, gpu=True, own_goal=goal)
    for kind in ("full", "causal"):
        for dtype in (F16, F32):
            case = _attention(kind, 4096, 128, dtype)
            for direction in ("forward", "backward"):
                yield Benchmark(kind, case, direction, False, flex=True, gpu=True)
    for name, length, changes in (
        ("gqa", 4096, {"kv_heads": 4}),
        ("window", 16384, {"window": (1024, None)}),
        ("dropout", 4096, {"dropout_p": 0.1}),
    ):
        case = _attention(name, length, 128, **changes)
        for direction in ("forward", "backward"):
            yield Benchmark(name, case, direction, False, flex=name != "dropout", gpu=True)
    for kind, kv_heads, length in (
        ("decode_gqa", 8, 8192),
        ("decode_gqa", 8, 65536),
        ("decode_mha", 32, 8192),
    ):
        batch = max(1, 131072 // length)
        case = AttentionCase(
            f"{kind}_l{length}_d128",
            batch=batch,
            heads=32,
            kv_heads=kv_heads,
            q_len=1,
            k_len=length,
            head_dim=128,
            return_lse=False,
            dtype=BF16,
        )
        yield Benchmark(kind, case, "forward", True, gpu=True, roof_goal=0.90)
    small = AttentionCase(
        "small_s128_d64", heads=8, q_len=128, head_dim=64, return_lse=False, dtype=BF16
    )
    for direction in ("call", "call_backward"):
        yield Benchmark("small", small, direction, True, gpu=True)


def _row_benchmarks() -> Iterator[Benchmark]:
    for dtype in (BF16, F32):
        for width in NORM_WIDTHS:
            for rms in (False, True):
                name = f"{'rms_' if rms else ''}{NUMBERS // width}x{width}"
                norm = LayerNormCase(name, shape=(NUMBERS // width, width), rms=rms, dtype=dtype)
                kind = "rms_norm" if rms else "layer_norm"
                quick = dtype is BF16 and not rms
                yield Benchmark(kind, norm, "forward", quick, gpu=True, roof_goal=0.95)
                yield Benchmark(
                    kind, norm, "backward", quick, gpu=True, roof_goal=0.85,
                    own_goal=None if rms else 2.0, rival="torch",
                )  # fmt: skip
        for width in SOFTMAX_WIDTHS:
            shape = (NUMBERS // width, width)
            case = SoftmaxCase(f"{shape[0]}x{width}", shape=shape, dtype=dtype)
            goal = 1.1 if width == 1024 else 1.0 if width <= 32768 else None
            roof = 0.97 if width > 32768 else None
            quick = dtype is BF16
            yield Benchmark(
                "softmax", case, "forward", quick, gpu=True, own_goal=goal, roof_goal=roof
            )
            yield Benchmark("softmax", case, "backward", quick, gpu=True)


def _all() -> Iterable[Benchmark]:
    yield from _attention_benchmarks()
    yield from _row_benchmarks()


BENCHMARKS: tuple[Benchmark, ...] = tuple(_all())
