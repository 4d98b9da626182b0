"""The CPU kernels of layer norm and softmax: what the case table does not reach."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import reference
from fastattn.backends import BACKENDS
from fastattn.backends.base import LayerNormCall, SoftmaxCall
from fastattn.testing import Comparison, assert_error_law, assert_laws, over_draws

CPU = BACKENDS["cpu"]
pytestmark = pytest.mark.skipif(CPU.unavailable() is not None, reason=str(CPU.unavailable()))

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Memory that torch.empty hands out holds NaN: whatever a kernel leaves unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def random(*shape, dtype=torch.float32, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale + shift).to(dtype)


def norm_call(x, weight=None, bias=None, **changes):
    fields = {"residual": None, "seed": None, "width": x.shape[-1], "eps": 1e-5, "rms": False}
    return LayerNormCall(x, weight=weight, bias=bias, **{**fields, "dropout_p": 0.0, **changes})


def softmax_call(x, dim=-1, mask=None, scale=1.0, log=False, dtype=None):
    return SoftmaxCall(x, dim % x.dim(), mask, scale, log, dtype or x.dtype)


def worst(got, true):
    return (got.double() - true).abs().max().item()


def cast(call, dtype):
    """The same call, in another dtype throughout."""
    tensors = {
        name: value.to(dtype)
        for name in ("x", "residual", "weight", "bias", "mask")
        if (value := getattr(call, name, None)) is not None and value.is_floating_point()
    }
    if isinstance(call, SoftmaxCall):
        tensors["dtype"] = dtype
    return call._replace(**tensors)


def naive_of(call):
    """What the error law measures against: the call itself, in float32 where it is float64."""
    return cast(call, torch.float32) if call.x.dtype is torch.float64 else call


def check(name, got, naive, true):
    if got is None:
        assert naive is None
        return
    assert got.is_contiguous()
    assert_error_law(name, got, naive, true)


def check_statistics(call, source, mean, rstd):
    rows = source.double().reshape(-1, call.width)
    centre = torch.zeros(len(rows), 1, dtype=torch.float64)
    if not call.rms:
        centre = torch.tensor(
            [[math.fsum(row) / call.width] for row in rows.tolist()], dtype=torch.float64
        )
        # A mean near 0 is as good as what was summed.
        assert worst(mean, centre.flatten()) <= torch.finfo(mean.dtype).eps * rows.abs().max()
    expected = (rows - centre).square().mean(-1).add(call.eps).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=3e-7, atol=0)


def check_layer_norm(call, dy, dnew_residual=None):
    naive, true = naive_of(call), cast(call, torch.float64)
    forward = CPU.layer_norm_forward(call)
    close, right = reference.layer_norm(naive), reference.layer_norm(true)
    for i, name in ((0, "y"), (1, "new_residual")):
        check(name, forward[i], close[i], right[i])

    source = call.x if forward[1] is None else forward[1]
    check_statistics(call, source, *forward[2:])
    has_residual = call.residual is not None
    after = call._replace(x=source, residual=source if has_residual else None)
    needs = (True, has_residual, call.weight is not None, call.bias is not None)
    got = CPU.layer_norm_backward(after, source, *forward[2:], dy, dnew_residual, needs)

    def expected(call, dtype):
        up = None if dnew_residual is None else dnew_residual.to(dtype)
        return reference.layer_norm_backward(call, call.x, dy.to(dtype), up)

    naive, true = naive_of(after), cast(after, torch.float64)
    close, right = expected(naive, naive.x.dtype), expected(true, torch.float64)
    names = ("dx", "dresidual", "dweight", "dbias")
    for each in zip(names, got, close, right, strict=True):
        check(*each)


def compare_softmax(call, dy=None):
    fields = ("x", "dim", "mask", "scale", "log", "dtype")
    calls = (naive_of(call), cast(call, torch.float64))
    y = CPU.softmax_forward(call)
    assert y.is_contiguous()
    results = [{"y": y}]
    results += [{"y": reference.softmax(*(getattr(c, name) for name in fields))} for c in calls]
    if dy is None:
        return Comparison(*results)

    results[0]["dx"] = CPU.softmax_backward(y, dy, call.dim, call.scale, call.log, call.x.dtype)
    assert results[0]["dx"].is_contiguous()
    for each, c in zip(results[1:], calls, strict=True):
        rest = (c.dim, c.scale, c.log, c.x.dtype)
        each["dx"] = reference.softmax_backward(y.to(c.dtype), dy.to(c.dtype), *rest)
    return Comparison(*results)


def check_softmax(call, dy=None):
    assert_laws(*compare_softmax(call, dy))


# ------------------------------------------------------------------------------------- layer norm

# Around a vector, a pair of vectors, an unrolled step and a block of 2048, in every ISA's width.
WIDTHS = (1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 768, 2047, 2048, 2049, 4100)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_of_any_width(width, dtype, rms):
    x, dy = random(5, width, dtype=dtype, scale=2, shift=1), random(5, width, dtype=dtype, seed=1)
    weight, bias = random(width, dtype=dtype, seed=2), random(width, dtype=dtype, seed=3)
    check_layer_norm(norm_call(x, weight, bias, rms=rms), dy)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False), (True, True)])
def test_layer_norm_with_float32_weights(given, dtype):
    weight = random(100, seed=2) if given[0] else None
    bias = random(100, seed=3) if given[1] else None
    x, dy = random(9, 100, dtype=dtype), random(9, 100, dtype=dtype, seed=1)
    check_layer_norm(norm_call(x, weight, bias), dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_huge_rows(dtype):
    x, dy = random(2, 300_001, dtype=dtype), random(2, 300_001, dtype=dtype, seed=1)
    weight, bias = random(300_001, dtype=dtype, seed=2), random(300_001, dtype=dtype, seed=3)
    check_layer_norm(norm_call(x, weight, bias), dy)


def test_layer_norm_keeps_its_digits_far_from_zero():
    x = random(4, 1000, shift=1e4)
    y = CPU.layer_norm_forward(norm_call(x))[0]
    assert worst(y, F.layer_norm(x.double(), (1000,))) < 2e-6
    outlier = random(4, 1000)
    outlier[:, 0] = 1e6  # the number that the sums are taken relative to
    y = CPU.layer_norm_forward(norm_call(outlier))[0]
    assert worst(y[:, 1:], F.layer_norm(outlier.double(), (1000,))[:, 1:]) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.1, 60000.0, -3.0])
@pytest.mark.parametrize("width", [5, 64, 5000])
def test_layer_norm_of_a_constant_row_is_the_bias(width, value, dtype):
    x = torch.full((3, width), value, dtype=dtype)
    bias = random(width, dtype=dtype)
    y = CPU.layer_norm_forward(norm_call(x, random(width, dtype=dtype, seed=1), bias))[0]
    assert torch.equal(y, bias.expand_as(y))


def test_layer_norm_of_large_halves_is_finite():
    x = random(4, 512, scale=60000).clamp(-60000, 60000).half()
    for rms in (False, True):
        check_layer_norm(norm_call(x, rms=rms), random(4, 512, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("width", [37, 512, 2600])
def test_add_layer_norm(width, dropout_p, dtype):
    x, residual, dy, dnew = (random(3, 4, width, dtype=dtype, seed=s) for s in range(4))
    weight, bias = random(width, seed=4), random(width, seed=5)
    seed = torch.tensor(-(2**40) + 12345) if dropout_p else None
    call = norm_call(x, weight, bias, residual=residual, seed=seed, dropout_p=dropout_p)
    check_layer_norm(call, dy, dnew)
    check_layer_norm(call, dy)


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_drops_what_the_reference_drops(p):
    x, seed = torch.ones(70, 2051), torch.tensor(987654321012345)
    call = norm_call(x, residual=torch.zeros_like(x), seed=seed, dropout_p=p)
    new_residual = CPU.layer_norm_forward(call)[1]
    assert torch.equal(new_residual, reference.layer_norm(call)[1])
    dx, dresidual, *_ = CPU.layer_norm_backward(
        call._replace(x=new_residual, residual=new_residual), new_residual,
        *CPU.layer_norm_forward(call)[2:], random(70, 2051), random(70, 2051, seed=1), (True,) * 2
        + (False,) * 2,
    )  # fmt: skip
    assert torch.equal(dx, dresidual * new_residual)


def layouts(*shape, dtype):
    """The same numbers in layouts that kernels walk, and in some that are copied."""
    x = random(*shape, dtype=dtype)
    yield x
    padded = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)
    padded[..., :-3] = x
    yield padded[..., :-3]
    yield torch.stack([x, x], dim=-1)[..., 0]
    order = range(x.dim())
    for permuted in ((1, 0, *order[2:]), (*order[:-2], order[-1], order[-2])):
        yield x.permute(permuted).contiguous().permute(permuted)
    yield x.flip(0)[:1].expand(shape[0], *shape[1:])
    buffer = torch.empty(x.numel() + 1, dtype=dtype)
    yield buffer[1:].view(shape).copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype):
    shape = (3, 4, 5, 2, 24)
    plain, dy = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    for x in layouts(*shape, dtype=dtype):
        for up in layouts(*shape, dtype=dtype):
            call = norm_call(x, random(24, dtype=dtype, seed=2))
            forward = CPU.layer_norm_forward(call)
            copied = call._replace(x=x.contiguous())
            assert torch.equal(forward[0], CPU.layer_norm_forward(copied)[0])
            needs = (True, False, True, False)
            got = CPU.layer_norm_backward(call, x, *forward[2:], up, None, needs)
            expected = CPU.layer_norm_backward(
                copied, copied.x, *forward[2:], up.contiguous(), None, needs
            )
            assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])
        for dim in range(5):
            y = CPU.softmax_forward(softmax_call(x, dim))
            assert torch.equal(y, CPU.softmax_forward(softmax_call(x.contiguous(), dim)))
            got = CPU.softmax_backward(y, dy, dim, 1.0, False, dtype)
            for up in (dy.transpose(1, 3).contiguous().transpose(1, 3), dy):
                assert torch.equal(CPU.softmax_backward(y, up, dim, 1.0, False, dtype), got)
    expanded = plain.sum().expand(shape)
    y = CPU.softmax_forward(softmax_call(plain, 2))
    assert worst(CPU.softmax_backward(y, expanded, 2, 1.0, False, dtype), torch.zeros(shape)) < 0.1


def test_normalised_shape_of_several_dimensions():
    x = random(4, 3, 6, 8).transpose(0, 1)
    call = norm_call(x, random(6, 8, seed=1), random(6, 8, seed=2), width=48)
    check_layer_norm(call, random(3, 4, 6, 8, seed=3))


def test_nothing_to_do():
    weight = random(8)
    call = norm_call(torch.empty(0, 8), weight, weight)
    y, _, mean, rstd = CPU.layer_norm_forward(call)
    assert y.shape == (0, 8) and mean.shape == rstd.shape == (0,)
    grads = CPU.layer_norm_backward(call, call.x, mean, rstd, y, None, (True, False, True, True))
    assert torch.equal(grads[2], torch.zeros(8)) and torch.equal(grads[3], torch.zeros(8))
    for shape in ((0, 8), (8, 0)):
        assert CPU.softmax_forward(softmax_call(torch.empty(shape))).shape == shape


# ---------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_softmax_of_any_width(width, dtype, log):
    def hold(layout, dim, dtype_out=dtype, scale=1.0):
        def draw(n):
            x = layout(random(5, width, dtype=dtype, scale=3, seed=2 * n))
            dy = random(5, width, dtype=dtype, seed=2 * n + 1).to(dtype_out)
            call = softmax_call(x, dim, scale=scale, log=log, dtype=dtype_out)
            return compare_softmax(call, dy if dim else dy.t())

        over_draws(draw)

    def columns(x):
        return x.t().contiguous()

    hold(torch.Tensor.contiguous, 1, scale=-0.7)
    hold(torch.Tensor.t, 0)
    hold(columns, 0)
    if dtype in HALVES:
        hold(torch.Tensor.contiguous, 1, torch.float32)
        hold(columns, 0, torch.float32)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_of_huge_rows(dtype, log):
    # A row's worst error is the one of its maximum's gradient, where the terms cancel: eight rows, so
    # that it is not PyTorch's luck in one that decides.
    x, dy = random(8, 300_001, dtype=dtype, scale=5), random(8, 300_001, dtype=dtype, seed=1)
    x[:, 150_000] += 30  # the last maximum comes late
    check_softmax(softmax_call(x, log=log), dy)
    check_softmax(softmax_call(x.t().contiguous(), 0, log=log), dy.t())


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_masks(dtype, dim, log):
    x, dy = random(6, 70, 40, dtype=dtype), random(6, 70, 40, dtype=dtype, seed=1)
    keep = random(6, 70, 40, seed=2) > -0.5
    keep[2], keep[:, 5], keep[:, :, 7] = False, False, False  # nothing to keep, whatever the dim
    for mask in (keep, keep[:1], keep[:, :1], keep[:, :, :1], keep[:1, :, :1], keep[:1, :1]):
        added = torch.where(mask, random(*mask.shape, seed=3), -torch.inf)
        for form in (
            mask,
            added,
            added.to(dtype),
            mask.transpose(0, 2).contiguous().transpose(0, 2),
        ):
            check_softmax(softmax_call(x, dim, form.expand(x.shape), 0.5, log), dy)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize("width", [4, 100, 5000, 70_000])
def test_special_values(width, log):
    rows = random(8, width, scale=4)
    rows[0] = -torch.inf
    rows[1, width // 2] = torch.nan
    rows[2, width // 2] = torch.inf
    rows[3, : width // 2] = -torch.inf
    rows[4] = 1e18
    rows[5, -1] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN of all ones
    expected = (F.log_softmax if log else F.softmax)(rows.double(), -1).float()
    for x, dim in ((rows, 1), (rows.t().contiguous(), 0)):
        y = CPU.softmax_forward(softmax_call(x, dim, log=log))
        torch.testing.assert_close(y if dim else y.t(), expected, equal_nan=True)
    # What is masked does not reach the rest, NaN and infinity included; what is not, does.
    mask = torch.ones(8, width, dtype=torch.bool)
    mask[:, width // 2] = False
    y = CPU.softmax_forward(softmax_call(rows, mask=mask, log=log))
    assert y[1:5].isnan().sum() == 0 and y[5].isnan().any()
    nothing = -torch.inf if log else 0.0
    assert (y[:, width // 2][:5] == nothing).all() and (y[0] == nothing).all()


# ------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_call_twice_is_bitwise_the_same(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, dy = random(3000, 100), random(3000, 100, seed=1)
        call = norm_call(x, random(100, seed=2), random(100, seed=3))
        statistics = CPU.layer_norm_forward(call)[2:]

        def run():
            needs = (True, False, True, True)
            y = CPU.softmax_forward(softmax_call(x))
            return (
                CPU.layer_norm_forward(call)[0],
                *CPU.layer_norm_backward(call, x, *statistics, dy, None, needs),
                y,
                CPU.softmax_backward(y, dy, 1, 1.0, False, x.dtype),
            )

        first = run()
        for _ in range(5):
            for a, b in zip(first, run(), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1024, 1021])
def test_outputs_that_pass_by_the_cache(width, dtype):
    rows = 2**23 // (width * dtype.itemsize) + 3
    x, dy = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    check_layer_norm(norm_call(x, weight, weight), dy)
    check_softmax(softmax_call(x), dy)
    check_softmax(softmax_call(x, log=True))
    check_softmax(softmax_call(x.t().contiguous(), 0), dy.t())


@pytest.mark.parametrize(
    "arguments",
    [
        (1, 2, 3, 4),
        ((), (), None, 1),
        ((None,) * 6, ((1, 1, 1, 1, 1), (torch.ones(1),), ((0, 0, 0, 1),), 1), None, 1),
        ((None,) * 6, ((1, 1), (torch.ones(1),), ((0, 0, 0, 1),), 1), torch.ones(1), 1),
        ((None,) * 6, ((1, 1, 1, 1, 1), [torch.ones(1)], ((0, 0, 0, 1),), 1), torch.ones(1), 1),
        ((None,) * 6, ((1, 1, 1, 1, 1), (torch.ones(1, device="meta"),), ((0,),), 1), None, 1),
    ],
)
def test_the_border_to_cpp_refuses_what_it_cannot_read(arguments):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        CPU.module.softmax_forward(*arguments)


def test_the_gradient_of_an_rms_norm_of_one_number():
    """eps rstd^3 dy, which is lost where it is taken as the difference of rstd dy and its like."""
    x = torch.tensor([[0.75], [-3.0], [2.0]], dtype=torch.float64, requires_grad=True)
    fastattn.rms_norm(x, (1,), eps=1e-12, backend="cpu").sum().backward()
    exact = 1e-12 * (x.detach().square() + 1e-12) ** -1.5
    torch.testing.assert_close(x.grad, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_of_many_rows_gathers_no_rounding(width, dtype):
    x = random(20000, width, dtype=dtype, shift=10)
    dy = random(20000, width, dtype=dtype, seed=1).abs()
    weight = torch.ones(width, requires_grad=True)
    fastattn.rms_norm(x, (width,), weight, eps=1e-5, backend="cpu").backward(dy)
    exact = (torch.rms_norm(x.double(), (width,), eps=1e-5) * dy.double()).sum(0)
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-6, atol=0)
