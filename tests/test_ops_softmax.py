"""Softmax: derivatives, and torch's own semantics."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastattn

INF = math.inf
pairs = pytest.mark.parametrize(
    ("ours", "torchs"), [(fastattn.softmax, F.softmax), (fastattn.log_softmax, F.log_softmax)]
)


def leaf(*shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g, dtype=dtype).requires_grad_()


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((4, 7), -1), ((4, 7), 0), ((2, 3, 5, 6), 1), ((9,), 0), ((), -1), ((3, 1), 1)],
)
def test_as_torch(backend, ours, torchs, dtype, shape, dim):
    x = leaf(*shape, dtype=dtype)
    mine, theirs = ours(x, dim, backend=backend), torchs(x, dim)
    assert mine.dtype is dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(mine)
    torch.testing.assert_close(
        torch.autograd.grad(mine, x, grad),
        torch.autograd.grad(theirs, x, grad),
        atol=4 * tolerance,
        rtol=4 * tolerance,
    )


@pairs
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dtype_casts_the_input_first(backend, ours, torchs, x_dtype, dtype):
    x = (leaf(5, 9) * 3).detach().to(x_dtype)
    mine, theirs = ours(x, -1, dtype, backend=backend), torchs(x, -1, dtype=dtype)
    assert mine.dtype is dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    if x.is_floating_point():
        x.requires_grad_()
        grad = torch.randn_like(mine)
        (got,) = torch.autograd.grad(ours(x, -1, dtype, backend=backend), x, grad)
        (expected,) = torch.autograd.grad(torchs(x, -1, dtype=dtype), x, grad)
        assert got.dtype is x_dtype
        tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(x_dtype).eps)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


MASKS = {
    "none": None,
    "row": torch.tensor([True, False, True, True, False]),
    "full": torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.4,
    "column": torch.tensor([[True], [False], [True], [True]]),
    "additive": leaf(4, 5).detach(),
    "float32": leaf(1, 4, 1, dtype=torch.float32).detach(),
}


@pairs
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dim", [-1, 1])
def test_scale_and_mask(backend, ours, torchs, mask, dim):
    x = leaf(3, 4, 5)
    scores = x * 0.7
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype is torch.bool else scores + mask
    theirs = torchs(scores, dim)
    mine = ours(x, dim, scale=0.7, mask=mask, backend=backend)
    blind = theirs.isnan()
    torch.testing.assert_close(mine[~blind], theirs[~blind])
    assert (mine[blind] == (-INF if ours is fastattn.log_softmax else 0)).all()
    finite = mine.isfinite() & ~blind
    mine, theirs = (torch.where(finite, y, 0.0) for y in (mine, theirs))
    grad = torch.randn_like(mine)
    got, expected = (torch.autograd.grad(y, x, grad)[0] for y in (mine, theirs))
    torch.testing.assert_close(got, torch.where(blind, 0.0, expected))


@pairs
def test_first_and_second_derivatives(backend, ours, torchs):
    x, mask = leaf(3, 5), leaf(1, 5)
    keywords = {"scale": 0.7, "backend": backend}
    assert gradcheck(lambda x: ours(x, 0, **keywords), x, check_batched_grad=True)
    assert gradgradcheck(lambda x: ours(x, 0, **keywords), x)
    assert gradcheck(lambda x, m: ours(x, mask=m, **keywords), (x, mask))
    kept = torch.tensor([True, True, False, True, True])
    assert gradgradcheck(lambda x: ours(x, mask=kept, **keywords)[:, kept], x)


@pairs
@pytest.mark.parametrize(
    "row",
    [[-INF, -INF, -INF], [INF, 0, 1], [math.nan, 0, 1], [-INF, 0, 1], [INF, -INF, 0], [3e38] * 3],
)
def test_rows_that_are_special(backend, ours, torchs, row):
    x = torch.tensor([row, [0.0, 1.0, 2.0]])
    torch.testing.assert_close(ours(x, backend=backend), torchs(x, -1), equal_nan=True)


@pairs
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_nothing(backend, ours, torchs, shape):
    x = leaf(*shape)
    y = ours(x, backend=backend)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pairs
def test_strides(backend, ours, torchs):
    x = leaf(8, 6, 5)
    for view in (x.permute(2, 1, 0), x[::2, :, 1:4], x[:, :1].expand(8, 6, 5)):
        for dim in (0, 1, 2):
            mine, theirs = ours(view, dim, backend=backend), torchs(view, dim)
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(
                torch.autograd.grad(mine.square().sum(), x),
                torch.autograd.grad(theirs.square().sum(), x),
            )


def test_wide_rows(backend):
    x = leaf(2, 300_000, dtype=torch.float32)
    torch.testing.assert_close(fastattn.softmax(x, backend=backend), F.softmax(x, -1))
