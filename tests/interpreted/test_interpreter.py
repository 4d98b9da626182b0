"""The interpreter that all other tests here trust: its bfloat16, casts and products against torch.

Each check is also run with the corrections undone, when it has to fail.
"""

import math

import pytest
import torch
import triton
import triton.language as tl

from fastattn.backends.triton import interpreter

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows

INF, NAN = math.inf, math.nan
EDGES = [0.0, -0.0, 1.0, -1.0, 1.00390625, 1.01171875, 3.3895314e38, 3.4e38, 1e-40, INF, -INF, NAN]


@pytest.fixture(autouse=True)
def corrected():
    interpreter.correct()
    yield
    interpreter.correct()


def numbers(dtype, n=1024, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp(4 * torch.randn(n, generator=generator))
    x[: len(EDGES)] = torch.tensor(EDGES)
    return x.to(dtype)


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == 0:
        out = x + y
    elif OP == 1:
        out = x - y
    elif OP == 2:
        out = x * y
    elif OP == 3:
        out = -x
    elif OP == 4:
        out = tl.abs(x)
    elif OP == 5:
        out = x * 2.5
    elif OP == 6:
        out = tl.where(x < y, x, y)
    elif OP == 7:
        out = (x == y).to(tl.bfloat16)
    elif OP == 8:
        out = tl.maximum(x, y)
    else:
        out = tl.minimum(x, y)
    tl.store(out_ptr + at, out)


ARITHMETIC = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "by_a_constant": lambda x, y: x * 2.5,
    "where_less": lambda x, y: torch.where(x < y, x, y),
    "equal": lambda x, y: (x == y).to(x.dtype),
    "maximum": torch.fmax,
    "minimum": torch.fmin,
}


def check_arithmetic(name):
    x, y = numbers(torch.bfloat16), numbers(torch.bfloat16, seed=1).flip(0)
    y[100:200] = x[100:200]
    out = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, out, x.numel(), list(ARITHMETIC).index(name), x.numel())
    torch.testing.assert_close(out, ARITHMETIC[name](x, y), rtol=0, atol=0, equal_nan=True)


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASTS = [(a, b) for a in (*FLOATS, torch.int32) for b in FLOATS if a is not b]
CASTS += [(torch.bfloat16, torch.int32)]


def check_cast(source, target):
    x = numbers(torch.float32)
    if torch.int32 in (source, target):
        x = (x.nan_to_num(0.0) * 100).clamp(-1e6, 1e6)
    x = x.to(source)
    out = torch.empty(x.shape, dtype=target)
    cast_kernel[(1,)](x, out, x.numel())
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


def check_rounding_of_every_tie():
    """float32 halfway between two bfloat16 numbers, and its neighbours on either side."""
    bits = torch.arange(0x3F80, 0x4080, dtype=torch.int32)  # one octave, and the next
    ties = torch.cat([(bits << 16) + 0x8000 + d for d in (-1, 0, 1)]).view(torch.float32)
    x = torch.cat([ties, -ties, ties.new_zeros(512)])
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, x.numel())
    assert torch.equal(out, x.bfloat16())


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    out = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(out_ptr + at, out)


def dot(dtype, precision="ieee"):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(64, 64)
    dot_kernel[(1,)](a, b, out, 64, precision)
    return out, a.double() @ b.double()


def check_dot(dtype):
    out, exact = dot(dtype)
    assert (out - exact).abs().max() < 2e-5


def check_tf32():
    """Not as exact as float32, and what products of numbers of ten bits give."""
    out, exact = dot(torch.float32, "tf32")
    error = (out - exact).abs().max()
    assert 1e-4 < error < 2e-2, error


@triton.jit
def reduce_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(x, axis=0))
    tl.store(out_ptr + 1, tl.max(x, axis=0))
    tl.store(out_ptr + 2, tl.min(x, axis=0))


def check_reductions():
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(3, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, out, 256)
    expected = torch.stack([x.float().sum(), x.float().max(), x.float().min()]).bfloat16()
    assert torch.equal(out, expected)


CHECKS = {
    **{f"{name}": (check_arithmetic, name) for name in ARITHMETIC},
    **{f"{a} to {b}": (check_cast, a, b) for a, b in CASTS},
    "ties": (check_rounding_of_every_tie,),
    "bfloat16 dot": (check_dot, torch.bfloat16),
    "float16 dot": (check_dot, torch.float16),
    "float32 dot": (check_dot, torch.float32),
    "tf32": (check_tf32,),
    "reductions": (check_reductions,),
}
# What the interpreter does right by itself.
RIGHT = {
    "abs",
    "float16 dot",
    "float32 dot",
    "torch.float32 to torch.float16",
    "torch.float16 to torch.float32",
    "torch.bfloat16 to torch.float16",
    "torch.bfloat16 to torch.int32",
    "torch.int32 to torch.float32",
    "torch.int32 to torch.float16",
}


@pytest.mark.parametrize("name", CHECKS)
def test_is_torchs(name):
    check, *arguments = CHECKS[name]
    check(*arguments)


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in RIGHT])
def test_is_wrong_without_the_correction(name):
    """A check that passes on the interpreter as it comes would show nothing."""
    check, *arguments = CHECKS[name]
    interpreter.undo()
    with pytest.raises(Exception):  # noqa: B017  # wrong numbers, or no such method
        check(*arguments)


def test_corrections_can_be_applied_twice():
    before = interpreter.InterpreterBuilder.create_dot
    interpreter.correct()
    assert interpreter.InterpreterBuilder.create_dot is before
    interpreter.undo()
    assert interpreter.InterpreterBuilder.create_dot is not before
