"""Layer norm and softmax at their edges, by every backend."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import testing
from fastattn.cases import DTYPES

INF, NAN = math.inf, math.nan
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
widths = pytest.mark.parametrize("width", [1, 3, 8, 17, 64, 1000, 5000])


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------- layer norm


@dtypes
@widths
def test_constant_row_is_exactly_the_bias(dtype, width, backend):
    weight, bias = randn(width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    for value in (0.0, 1.0, -3.25, 1000.0):
        x = torch.full((3, width), value, dtype=dtype)
        y = fastattn.layer_norm(x, (width,), weight, bias, backend=backend)
        assert torch.equal(y, bias.expand_as(y)), value


@pytest.mark.parametrize("width", [64, 768, 5000])
@pytest.mark.parametrize("mean", [1e4, -1e5])
def test_large_mean_needs_two_passes(mean, width, backend):
    """With E[x^2] - E[x]^2 nothing would be left of the variance."""
    x = (mean + randn(40, width)).requires_grad_()
    testing.check_layer_norm(backend, x, (width,), randn(width, seed=1))
    y = fastattn.layer_norm(x, (width,), backend=backend)
    assert abs(y.std().item() - 1) < 1e-2 and abs(y.mean().item()) < 1e-2


@pytest.mark.parametrize("rms", [False, True])
def test_float16_at_its_largest(rms, backend):
    x = (60000 * randn(5, 256).sign()).half().requires_grad_()
    got = testing.check_layer_norm(backend, x, (256,), rms=rms)
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,), (4, 0)])
@pytest.mark.parametrize("residual", [False, True])
def test_zero_rows(shape, residual, backend):
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(shape[-1:], requires_grad=True)
    bias = torch.ones(shape[-1:], requires_grad=True)
    if residual:
        y, new = fastattn.add_layer_norm(x, x, shape[-1:], weight, bias, backend=backend)
        assert new.shape == x.shape
    else:
        y = fastattn.layer_norm(x, shape[-1:], weight, bias, backend=backend)
    assert y.shape == x.shape
    for leaf, grad in zip(
        (x, weight, bias), torch.autograd.grad(y.sum(), (x, weight, bias)), strict=True
    ):
        assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [300_000, 300_001])
def test_layer_norm_of_wide_rows(width, dtype, rms, backend):
    x = randn(2, width, dtype=dtype).requires_grad_()
    weight = randn(width, dtype=dtype, seed=1).requires_grad_()
    testing.check_layer_norm(backend, x, (width,), weight, rms=rms)


@pytest.mark.parametrize(
    "which", [(True, True), (True, False), (False, True), (False, False)], ids=str
)
@dtypes
def test_layer_norm_is_torchs(which, dtype, backend):
    """Weight without bias and the other way round; the dtype that torch gives."""
    x = randn(7, 96, dtype=dtype)
    weight = randn(96, dtype=dtype, seed=1) if which[0] else None
    bias = randn(96, dtype=dtype, seed=2) if which[1] else None
    got = fastattn.layer_norm(x, (96,), weight, bias, 1e-3, backend=backend)
    torch.testing.assert_close(got, F.layer_norm(x, (96,), weight, bias, 1e-3))
    got = fastattn.rms_norm(x, (96,), weight, backend=backend)
    torch.testing.assert_close(got, F.rms_norm(x, (96,), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_of_narrow_inputs(dtype, backend):
    x = randn(7, 96, dtype=dtype).requires_grad_()
    weight, bias = randn(96, seed=1).requires_grad_(), randn(96, seed=2).requires_grad_()
    got = testing.check_layer_norm(backend, x, (96,), weight, bias)
    assert got["y"].dtype is dtype and got["dx"].dtype is dtype
    assert got["dweight"].dtype is got["dbias"].dtype is torch.float32


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@widths
def test_nan_stays_in_its_row(width, value, rms, backend):
    x = randn(5, width)
    x[2, width // 2] = value
    norm = fastattn.rms_norm if rms else fastattn.layer_norm
    y = norm(x.requires_grad_(), (width,), backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    others = torch.tensor([0, 1, 3, 4])
    assert y[others].isfinite().all() and dx[others].isfinite().all()
    torchs = (F.rms_norm if rms else F.layer_norm)(x, (width,))
    torch.testing.assert_close(y, torchs, equal_nan=True)


@dtypes
def test_added_residual_is_the_sum(dtype, backend):
    x, residual = randn(9, 50, dtype=dtype), randn(9, 50, dtype=dtype, seed=1)
    y, new = fastattn.add_layer_norm(x, residual, (50,), backend=backend)
    assert torch.equal(new, x + residual)
    torch.testing.assert_close(y, F.layer_norm(x + residual, (50,)))
    y, new = fastattn.add_layer_norm(x, residual, (50,), dropout_p=1.0, backend=backend)
    assert torch.equal(new, residual)


# ---------------------------------------------------------------------------------------- softmax

SPECIAL = {
    "minus_infinity": lambda x: x.fill_(-INF),
    "some_minus_infinity": lambda x: x.masked_fill_(torch.arange(x.shape[-1]) % 2 == 0, -INF),
    "nan": lambda x: x[..., :1].fill_(NAN),
    "last_nan": lambda x: x[..., -1:].fill_(NAN),
    "infinity": lambda x: x[..., -1:].fill_(INF),
    "two_infinities": lambda x: x[..., -2:].fill_(INF),
    "huge": lambda x: x.mul_(1e4),
    "all_low": lambda x: x.sub_(2000),
    "largest": lambda x: x[..., -1:].fill_(torch.finfo(x.dtype).max),
    "smallest": lambda x: x.fill_(torch.finfo(x.dtype).min),
}


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("special", SPECIAL)
@dtypes
@widths
def test_special_rows_as_torch(width, dtype, special, log, backend):
    x = randn(4, width, dtype=dtype)
    SPECIAL[special](x[1])
    for dim, tensor in ((-1, x), (0, x.mT.contiguous())):
        ours = (fastattn.log_softmax if log else fastattn.softmax)(tensor, dim, backend=backend)
        wide = tensor if dtype is torch.float64 else tensor.float()  # torch's own bfloat16 is rough
        torchs = (F.log_softmax if log else F.softmax)(wide, dim).to(dtype)
        torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("dim", [-1, 0])
@dtypes
@widths
def test_fully_masked_rows_are_zeros(width, dtype, dim, log, backend):
    x = randn(5, width, dtype=dtype)
    mask = torch.ones(5, width, dtype=torch.bool)
    mask[2] = False
    if dim == 0:
        x, mask = x.mT, mask.mT
    row = (slice(None), 2) if dim == 0 else 2
    function = fastattn.log_softmax if log else fastattn.softmax
    for m in (mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -INF)):
        leaf = x.detach().requires_grad_()
        y = function(leaf, dim, mask=m, backend=backend)
        assert (y[row] == (-INF if log else 0)).all()
        (dx,) = torch.autograd.grad(y.masked_fill(~mask, 0).square().sum(), leaf)
        assert (dx[row] == 0).all() and dx.isfinite().all()


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [300_000, 300_001])
def test_softmax_of_wide_rows(width, dtype, log, backend):
    x = (3 * randn(2, width, dtype=dtype)).requires_grad_()
    testing.check_softmax(backend, x, log=log)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4), ()])
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_of_nothing(shape, log, backend):
    x = torch.zeros(shape, requires_grad=True)
    for dim in range(-max(x.dim(), 1), max(x.dim(), 1)):
        y = (fastattn.log_softmax if log else fastattn.softmax)(x, dim, backend=backend)
        assert torch.equal(y, (F.log_softmax if log else F.softmax)(x, dim))
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softmax_of_narrow_input_in_a_wider_dtype(dtype, backend):
    x = randn(6, 77, dtype=torch.bfloat16).requires_grad_()
    y = fastattn.softmax(x, -1, dtype, backend=backend)
    torch.testing.assert_close(y, F.softmax(x, -1, dtype=dtype))
    grad = randn(6, 77, dtype=dtype, seed=1)
    torchs = torch.autograd.grad(F.softmax(x, -1, dtype=dtype), x, grad)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torchs)


def test_rows_beyond_32_bits(backend):
    step = 2**31
    base = torch.empty(step + 1001, dtype=torch.bfloat16)
    x = base.as_strided((2, 1000), (step, 1), 1).copy_(randn(2, 1000))
    same = x.contiguous()
    assert torch.equal(
        fastattn.softmax(x, backend=backend), fastattn.softmax(same, backend=backend)
    )
    assert torch.equal(
        fastattn.layer_norm(x, (1000,), backend=backend),
        fastattn.layer_norm(same, (1000,), backend=backend),
    )
