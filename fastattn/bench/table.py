"""What is benchmarked, and the goal of each: torch's time over ours on two CPU threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from ..cases import AttentionCase, Case, LayerNormCase, SoftmaxCase

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# (kind, direction) -> dtype -> goal. A ratio under 1 says how much slower we may be.
GOALS: dict[tuple[str, str], dict[torch.dtype, float]] = {
    ("full", "forward"): {F32: 1.3, BF16: 2.4, F16: 3.0},
    ("causal", "forward"): {F32: 1.6, BF16: 2.9, F16: 3.5},
    ("full", "backward"): {F32: 1.3, BF16: 1.7},
    ("causal", "backward"): {F32: 1.5, BF16: 2.1},
    ("bias", "forward"): {F32: 1.4, BF16: 1.6},
    ("dropout", "forward"): {F32: 4.0, BF16: 5.0},
    ("decode_mha", "forward"): {F32: 2.4, BF16: 5.0, F16: 5.0},
    ("decode_gqa", "forward"): {F32: 5.0, BF16: 25.0, F16: 20.0},
    ("layer_norm", "forward"): {F32: 1.2, BF16: 1.8},
    ("layer_norm", "backward"): {F32: 1.3, BF16: 2.5},
    ("softmax", "forward"): {F32: 1.3, BF16: 2.2},
    ("softmax", "backward"): {F32: 1.1, BF16: 1.3},
    ("layer_norm_fresh", "forward"): {F32: 2.0, BF16: 2.0},
    ("softmax_fresh", "forward"): {F32: 2.0, BF16: 2.0},
    ("small", "call"): {F32: 0.5},
    ("small", "call_backward"): {F32: 0.5},
}

LENGTHS = (512, 1024, 2048, 4096)
ROW_SHAPES = ((4096, 1024), (4096, 4096), (512, 32768), (256, 768))


@dataclass(frozen=True)
class Benchmark:
    """One line of the report.

    direction: "forward" (autograd off), "backward" (alone: the graph is built outside the clock),
    or, where the overhead of a call is the point, "call" (forward with autograd on) and
    "call_backward" (the same and its backward).
    """

    kind: str
    case: Case
    direction: str
    quick: bool
    flex: bool = False  # also time FlexAttention, whose compilation takes many seconds
    default_allocator: bool = False  # outputs on fresh pages, as users have it
    gpu: bool = False
    own_goal: float | None = None  # of a GPU's; a CPU's are in GOALS
    roof_goal: float | None = None  # the share of the roof to reach
    rival: str = ""  # whom the goal is against; "": whom Result.rival finds

    @property
    def id(self) -> str:
        return f"{self.case}-{self.direction}"

    @property
    def goal(self) -> float | None:
        if self.gpu:
            return self.own_goal
        return GOALS.get((self.kind, self.direction), {}).get(self.case.dtype)

    @property
    def backward(self) -> bool:
        return self.direction in ("backward", "call_backward")


def _attention_shapes() -> Iterable[Benchmark]:
    for length in LENGTHS:
        for head_dim in (64, 128):
            for kind in ("full", "causal"):
                for dtype in (F32, BF16, F16):
                    case = AttentionCase(
                        f"{kind}_s{length}_d{head_dim}",
                        batch=1,
                        heads=8,
                        q_len=length,
                        head_dim=head_dim,
                        causal=kind == "causal",
                        return_lse=False,
                        dtype=dtype,
                    )
                    middle = (length, head_dim) in ((512, 64), (1024, 64), (1024, 128))
                    forward_quick = middle or (length, head_dim) == (2048, 64)
                    if dtype == F16:
                        forward_quick = (length, head_dim) == (1024, 64)
                    flex = (length, head_dim) == (1024, 64) and dtype != F16
                    yield Benchmark(kind, case, "forward", forward_quick, flex=flex)
                    if dtype != F16:
                        yield Benchmark(kind, case, "backward", middle)


def _attention_variants() -> Iterable[Benchmark]:
    for dtype in (F32, BF16):
        for length in (1024, 4096):
            common = {"batch": 1, "heads": 8, "q_len": length, "head_dim": 64, "dtype": dtype}
            bias = AttentionCase(
                f"bias_s{length}_d64",
                bias="additive",
                bias_shape="1hqk",
                return_lse=False,
                **common,  # type: ignore[arg-type]
            )
            dropout = AttentionCase(
                f"dropout_s{length}_d64",
                dropout_p=0.1,
                return_lse=False,
                **common,  # type: ignore[arg-type]
            )
            yield Benchmark("bias", bias, "forward", length == 1024)
            yield Benchmark("dropout", dropout, "forward", length == 1024)
    for dtype in (F32, BF16, F16):
        for kind, kv_heads in (("decode_mha", 32), ("decode_gqa", 8)):
            case = AttentionCase(
                f"{kind}_l4096_d128",
                batch=1,
                heads=32,
                kv_heads=kv_heads,
                q_len=1,
                k_len=4096,
                head_dim=128,
                return_lse=False,
                dtype=dtype,
            )
            yield Benchmark(kind, case, "forward", True)
    small = AttentionCase(
        "small_s16_d64", batch=1, heads=8, q_len=16, head_dim=64, return_lse=False
    )
    yield Benchmark("small", small, "call", True)
    yield Benchmark("small", small, "call_backward", True)


def _rows() -> Iterable[Benchmark]:
    for kind, make in (("layer_norm", LayerNormCase), ("softmax", SoftmaxCase)):
        for rows, width in ROW_SHAPES:
            for dtype in (F32, BF16):
                case = make(f"{rows}x{width}", shape=(rows, width), dtype=dtype)
                for direction in ("forward", "backward"):
                    yield Benchmark(kind, case, direction, quick=width != 4096)
        for dtype in (F32, BF16):
            shape = (16384, 2**26 // 16384 // dtype.itemsize)
            case = make("fresh_64mb", shape=shape, dtype=dtype)
            yield Benchmark(f"{kind}_fresh", case, "forward", True, default_allocator=True)


BENCHMARKS: tuple[Benchmark, ...] = (*_attention_shapes(), *_attention_variants(), *_rows())


def matches(pattern: str, name: str) -> bool:
    """Part of the name, or a shell pattern for all of it."""
    return pattern in name or fnmatch(name, pattern)


def choose(
    full: bool = False,
    op: str | None = None,
    dtype: str | None = None,
    pattern: str | None = None,
    benchmarks: Sequence[Benchmark] = BENCHMARKS,
) -> list[Benchmark]:
    """Those ``benchmarks`` of a preset that a filter leaves. A pattern that names a case reaches
    past the preset: `--case '*s4096*'` runs them though they are not in the quick suite."""
    chosen = []
    for benchmark in benchmarks:
        if op and benchmark.case.op != op:
            continue
        if dtype and str(benchmark.case.dtype) != f"torch.{dtype}":
            continue
        if pattern and not matches(pattern, benchmark.id):
            continue
        if full or benchmark.quick or pattern:
            chosen.append(benchmark)
    return chosen
