"""The layer norm family: derivatives of every input, and torch's own semantics."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastattn

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)


def leaves(*shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def same(ours, torchs, inputs):
    """The outputs and the gradients of all inputs."""
    tolerance = 3 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, torchs, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(torchs, inputs, grad),
        strict=True,
    ):
        assert mine.dtype is theirs.dtype
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, atol=4 * tolerance * scale, rtol=4 * tolerance)


SHAPES = [((3, 5, 8), (8,)), ((3, 5, 8), (5, 8)), ((6,), (6,)), ((2, 3, 4), (2, 3, 4))]


@dtypes
@pytest.mark.parametrize(("shape", "normalized_shape"), SHAPES)
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
def test_layer_norm_is_torchs(backend, dtype, shape, normalized_shape, affine):
    x, weight, bias = leaves(shape, normalized_shape, normalized_shape, dtype=dtype)
    weight = weight if affine in ("weight", "both") else None
    bias = bias if affine in ("bias", "both") else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    same(
        fastattn.layer_norm(x, normalized_shape, weight, bias, backend=backend),
        F.layer_norm(x, normalized_shape, weight, bias),
        inputs,
    )


@dtypes
@pytest.mark.parametrize(("shape", "normalized_shape"), SHAPES)
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_is_torchs(backend, dtype, shape, normalized_shape, eps):
    x, weight = leaves(shape, normalized_shape, dtype=dtype)
    same(
        fastattn.rms_norm(x, normalized_shape, weight, eps, backend=backend),
        F.rms_norm(x, normalized_shape, weight, eps),
        [x, weight],
    )


def test_float32_weights_on_bfloat16(backend):
    (x,) = leaves((4, 8), dtype=torch.bfloat16)
    weight, bias = leaves((8,), (8,), dtype=torch.float32)
    same(
        fastattn.layer_norm(x, (8,), weight, bias, backend=backend),
        F.layer_norm(x, (8,), weight, bias),
        [x, weight, bias],
    )
    out = fastattn.rms_norm(x, (8,), weight, backend=backend)
    assert out.dtype is torch.bfloat16
    assert torch.autograd.grad(out.sum(), weight)[0].dtype is torch.float32


@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)]
)
def test_rms_norm_takes_a_weight_of_any_dtype(backend, x_dtype, dtype):
    x, weight = leaves((4, 8), (8,), dtype=torch.float32)
    x, weight = x.to(x_dtype), weight.to(dtype)
    out = fastattn.rms_norm(x, (8,), weight, backend=backend)
    assert out.dtype is x_dtype
    expected = F.rms_norm(x.double(), (8,), weight.double(), torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out, expected.to(x_dtype))


@pytest.mark.parametrize(
    ("name", "dropout_p"),
    [
        ("layer_norm", 0.0),
        ("rms_norm", 0.0),
        ("add_layer_norm", 0.0),
        ("add_layer_norm", 0.4),
        ("add_rms_norm", 0.4),
    ],
)
def test_first_and_second_derivatives(backend, name, dropout_p):
    x, residual, weight, bias = leaves((3, 2, 4), (3, 2, 4), (2, 4), (2, 4))
    affine = (weight,) if "rms" in name else (weight, bias)
    leading, keywords = (x,), {}
    if name.startswith("add"):
        leading, keywords = (x, residual), {"dropout_p": dropout_p}

    def function(*inputs):
        torch.manual_seed(0)
        split = len(leading)
        return getattr(fastattn, name)(
            *inputs[:split], (2, 4), *inputs[split:], backend=backend, **keywords
        )

    assert gradcheck(function, (*leading, *affine), check_batched_grad=True)
    assert gradgradcheck(function, (*leading, *affine))


@dtypes
@pytest.mark.parametrize("rms", [False, True])
def test_fused_residual_is_the_sum_and_its_norm(backend, dtype, rms):
    x, residual, weight = leaves((3, 5, 8), (3, 5, 8), (8,), dtype=dtype)
    add_norm, norm = (
        (fastattn.add_rms_norm, fastattn.rms_norm)
        if rms
        else (fastattn.add_layer_norm, fastattn.layer_norm)
    )
    normed, new_residual = add_norm(x, residual, (8,), weight, backend=backend)
    assert torch.equal(new_residual, x + residual)
    same(normed, norm(x + residual, (8,), weight, backend=backend), [x, residual, weight])
    normed, new_residual = add_norm(x, residual, (8,), weight, backend=backend)
    same(normed + new_residual, norm(x + residual, (8,), weight) + (x + residual), [x, weight])


def test_residual_dropout(backend):
    x, residual = leaves((64, 33), (64, 33), dtype=torch.float32)

    def branch(p):
        torch.manual_seed(5)
        total = fastattn.add_layer_norm(x, residual, (33,), dropout_p=p, backend=backend)[1]
        return total - residual

    kept = branch(0.25) != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.05
    torch.testing.assert_close(branch(0.25), torch.where(kept, x / 0.75, 0.0))
    assert torch.equal(branch(0.25), branch(0.25))
    assert (branch(1.0) == 0).all()


def test_only_one_output_is_used(backend):
    x, residual, weight = leaves((3, 8), (3, 8), (8,))
    normed, new_residual = fastattn.add_layer_norm(x, residual, (8,), weight, backend=backend)
    (grad,) = torch.autograd.grad(new_residual.sum(), x, retain_graph=True)
    assert torch.equal(grad, torch.ones_like(x))
    (grad,) = torch.autograd.grad(normed.square().sum(), x)
    assert grad.isfinite().all()


def test_values_that_are_hard(backend):
    g = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(4, 256, generator=g)
    got = fastattn.layer_norm(x, (256,), backend=backend)
    torch.testing.assert_close(got, F.layer_norm(x.double(), (256,)).float(), atol=2e-3, rtol=0)
    weight, bias = torch.randn(16), torch.randn(16)
    constant = fastattn.layer_norm(torch.full((3, 16), 7.0), (16,), weight, bias, backend=backend)
    assert torch.equal(constant, bias.expand(3, 16))
    large = torch.full((2, 64), 60000.0, dtype=torch.float16)
    large[:, ::2] *= -1
    torch.testing.assert_close(
        fastattn.layer_norm(large, (64,), backend=backend), large.sign(), atol=1e-3, rtol=0
    )
    assert fastattn.rms_norm(large, (64,), backend=backend).isfinite().all()


def test_rows_of_one_number(backend):
    x, weight, bias = leaves((4, 1), (1,), (1,))
    y = fastattn.layer_norm(x, (1,), weight, bias, backend=backend)
    assert torch.equal(y, bias.expand(4, 1))
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert (dx == 0).all() and (dweight == 0).all() and (dbias == 4).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(backend, shape):
    x, weight, bias = leaves(shape, (8,), (8,))
    y = fastattn.layer_norm(x, (8,), weight, bias, backend=backend)
    assert y.shape == shape
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert grads[0].shape == shape and (grads[1] == 0).all() and (grads[2] == 0).all()


def test_rows_without_numbers(backend):
    y = fastattn.layer_norm(torch.zeros(4, 0), (0,), backend=backend)
    assert y.shape == (4, 0)


def test_strides(backend):
    (x,) = leaves((8, 6, 5))
    for view in (x.permute(2, 1, 0), x[::2, :, 1:4], x[:, :1].expand(8, 6, 5), x.mT):
        shape = (view.shape[-1],)
        got = fastattn.layer_norm(view, shape, backend=backend)
        torch.testing.assert_close(got, F.layer_norm(view, shape))
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), x),
            torch.autograd.grad(F.layer_norm(view, shape).square().sum(), x),
        )
