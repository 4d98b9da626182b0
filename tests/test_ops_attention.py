"""The public attention functions: derivatives of every input, and torch's own semantics."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import testing
from fastattn.backends import BACKENDS as BY_NAME


def leaves(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


VARIANTS = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 2.0, "scale": -0.5},
    "alibi": {"alibi_slopes": torch.tensor([[0.5, 0.25, 0.1, 1.0], [1.0, 0.5, 0.3, 0.2]])},
    "dropout": {"dropout_p": 0.4},
    "all": {
        "causal": True,
        "window": (3, None),
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0]),
        "dropout_p": 0.3,
    },
}


@pytest.mark.parametrize("keywords", VARIANTS.values(), ids=VARIANTS)
def test_first_and_second_derivatives(backend, keywords):
    def function(q, k, v, bias, sinks):
        torch.manual_seed(0)
        return fastattn.attention(
            q, k, v, bias=bias, sinks=sinks, return_lse=True, backend=backend, **keywords
        )

    inputs = leaves((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 3), (4, 1, 5), (4,))
    assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "shape",
    [(5,), (3, 1), (3, 5), (1, 4, 1, 1), (4, 3, 5), (2, 1, 1, 5), (1, 1, 1, 1), (2, 4, 3, 5)],
)
def test_bias_gradient_has_the_bias_shape(backend, shape):
    *qkv, bias = leaves((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 2), shape)

    def function(bias):
        return fastattn.attention(*qkv, bias=bias, backend=backend)

    assert gradcheck(function, bias, fast_mode=True)
    transposed = leaves(shape[::-1])[0]
    assert gradcheck(
        lambda b: function(b.permute(*range(b.dim())[::-1])), transposed, fast_mode=True
    )


def test_gradient_of_an_expanded_bias(backend):
    q, k, v, small = leaves((2, 2, 3, 2), (2, 2, 5, 2), (2, 2, 5, 2), (1, 2, 1, 5))
    full = small.detach().expand(2, 2, 3, 5).requires_grad_()  # a leaf: its elements are its own

    def function(bias):
        return fastattn.attention(q, k, v, bias=bias, backend=backend).square().sum()

    dense = full.detach().clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(function(full), full), torch.autograd.grad(function(dense), dense)
    )
    (through,) = torch.autograd.grad(function(small.expand(2, 2, 3, 5)), small)
    (direct,) = torch.autograd.grad(function(small), small)
    torch.testing.assert_close(through, direct)
    empty = full.detach()[:, :, :0].requires_grad_()  # keeps its strides of 0
    out = fastattn.attention(q[:, :, :0], k, v, bias=empty, backend=backend)
    assert torch.autograd.grad(out.sum(), empty)[0].shape == empty.shape


def test_alibi_slopes_may_be_learned(backend):
    q, k, v, slopes, bias = leaves((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 2), (4,), (3, 5))

    def function(slopes, bias):
        return fastattn.attention(
            q, k, v, causal=True, alibi_slopes=slopes, bias=bias, backend=backend
        )

    assert gradcheck(function, (slopes, bias))
    fixed = function(slopes.detach(), bias)
    torch.testing.assert_close(function(slopes, bias), fixed)
    mask = torch.rand(3, 5) > 0.4
    torch.testing.assert_close(function(slopes, mask), function(slopes.detach(), mask))


def test_one_input_computed_from_another(backend):
    def function(x):
        return fastattn.attention(x, x * 2, x.sin(), causal=True, backend=backend)

    (x,) = leaves((1, 2, 4, 3))
    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


def test_only_the_gradients_asked_for(backend, monkeypatch):
    asked = []
    kernel = type(BY_NAME[backend])
    original = kernel.attention_backward

    def spy(self, call, *tensors):
        asked.append(tensors[-1])
        return original(self, call, *tensors)

    monkeypatch.setattr(kernel, "attention_backward", spy)
    q, k, v, bias = leaves((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), (3, 3))
    k.requires_grad_(False)
    out = fastattn.attention(q, k, v, bias=bias, backend=backend)
    grads = torch.autograd.grad(out.sum(), (v,))
    assert grads[0] is not None
    out = fastattn.attention(q.detach(), k, v.detach(), bias=bias, backend=backend)
    out.sum().backward()
    assert asked[-1] == (False, False, False, True, False)
    assert q.grad is None and k.grad is None and bias.grad is not None


def test_lse_alone_has_a_gradient(backend):
    q, k, v = leaves((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))

    def lse(q, k):
        return fastattn.attention(q, k, v, return_lse=True, backend=backend)[1]

    assert gradcheck(lse, (q, k))
    expected = torch.logsumexp(q @ k.mT / 2, -1)
    torch.testing.assert_close(lse(q, k), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_results(backend, dtype):
    q = torch.randn(2, 3, 4, 8).to(dtype).requires_grad_()
    out, lse = fastattn.attention(q, q, q, return_lse=True, backend=backend)
    assert out.dtype is dtype
    assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), q)
    assert grad.dtype is dtype


def test_output_keeps_the_layout_of_a_model(backend):
    """(B, S, H, D) projections seen as (B, H, S, D) come back without a copy."""
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    q = x.transpose(1, 2)
    out = fastattn.attention(q, q, q, backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    assert fastattn.attention(*[q.contiguous()] * 3, backend=backend).is_contiguous()
    torch.testing.assert_close(out, fastattn.attention(*[q.contiguous()] * 3, backend=backend))


def test_same_seed_same_dropout(backend):
    q, k, v = leaves((2, 2, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4))

    def loss(q):
        return fastattn.attention(q, k, v, dropout_p=0.5, backend=backend).square().sum()

    def seeded(function):
        torch.manual_seed(3)
        return torch.autograd.grad(function(q), q)[0]

    first = seeded(loss)
    assert torch.equal(first, seeded(loss))
    assert torch.equal(first, seeded(lambda q: checkpoint(loss, q, use_reentrant=False)))
    assert not torch.equal(first, torch.autograd.grad(loss(q), q)[0])


def test_determinism_flags(backend):
    q, k, v = leaves((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4))
    torch.use_deterministic_algorithms(True)
    try:
        first = fastattn.attention(q, k, v, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for deterministic in (True, False, None):
        out = fastattn.attention(q, k, v, deterministic=deterministic, backend=backend)
        assert torch.equal(out, first)


def test_autocast_as_torch(backend):
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    bias = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention(q, q, q, bias=bias, backend=backend)
        same = fastattn.scaled_dot_product_attention(q, q, q, bias, backend=backend)
        torchs = F.scaled_dot_product_attention(q, q, q, bias)
        double = fastattn.attention(*[q.double()] * 3, backend=backend)
    assert out.dtype is same.dtype is torchs.dtype is torch.bfloat16
    assert double.dtype is torch.float64
    torch.testing.assert_close(out, torchs, atol=0.03, rtol=0.03)
    assert torch.equal(out, same)
    out.sum().backward()
    assert q.grad.dtype is torch.float32


def test_forward_mode_is_refused_not_ignored(backend):
    q = torch.randn(1, 2, 4, 8)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        fastattn.attention(forward_ad.make_dual(q, q), q, q, backend=backend)


def test_negative_view(backend):
    """A real tensor that PyTorch keeps as the negative of its memory."""
    x = torch.randn(2, 3, 4, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    expected = fastattn.attention(*[x.clone()] * 3, backend=backend)
    torch.testing.assert_close(fastattn.attention(x, x, x, backend=backend), expected)


def test_lazy_zeros(backend):
    """Zeros that have no memory, which autograd makes where there is no gradient."""
    x = torch._efficientzerotensor(2, 3, 4, 8)
    expected = torch.zeros(2, 3, 4, 8)
    assert torch.equal(fastattn.attention(x, x, x, backend=backend), expected)
    assert torch.equal(fastattn.layer_norm(x, (8,), backend=backend), expected)
    assert torch.equal(fastattn.softmax(x, backend=backend), expected + 1 / 8)


# --------------------------------------------------------------------------- torch's own signature


SHAPES = [  # query, key, value, enable_gqa
    ((5, 8), (7, 8), (7, 8), False),
    ((3, 5, 8), (3, 7, 8), (3, 7, 4), False),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), False),
    ((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 8), False),
    ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8), False),
    ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), False),
    ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), False),
    ((2, 3, 5, 8), (3, 7, 8), (3, 7, 8), False),
    ((2, 3, 5, 8), (7, 8), (7, 8), False),
    ((5, 8), (2, 3, 7, 8), (2, 3, 7, 8), False),
    ((2, 1, 3, 5, 8), (4, 3, 7, 8), (1, 4, 1, 7, 8), False),
    ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), True),
    ((4, 5, 8), (2, 7, 8), (2, 7, 8), True),
    ((2, 3, 4, 5, 8), (2, 3, 1, 7, 8), (2, 3, 1, 7, 8), True),
    ((2, 4, 5, 8), (1, 7, 8), (1, 7, 8), True),
]


@pytest.mark.parametrize(("query", "key", "value", "enable_gqa"), SHAPES)
@pytest.mark.parametrize("variant", ["plain", "causal", "scale", "bool", "additive", "row"])
def test_scaled_dot_product_attention_is_torchs(backend, query, key, value, enable_gqa, variant):
    inputs = leaves(query, key, value)
    keywords = {
        "plain": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "bool": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.3},
        "additive": {"attn_mask": leaves((5, 7), seed=2)[0]},
        "row": {"attn_mask": leaves((1, 7), seed=2)[0]},
    }[variant]
    ours = fastattn.scaled_dot_product_attention(
        *inputs, enable_gqa=enable_gqa, backend=backend, **keywords
    )
    torchs = F.scaled_dot_product_attention(*inputs, enable_gqa=enable_gqa, **keywords)
    torch.testing.assert_close(ours, torchs)
    if variant in ("additive", "row"):
        inputs.append(keywords["attn_mask"])
    grad = torch.randn_like(ours)
    grads = zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(torchs, inputs, grad),
        strict=True,
    )
    for mine, theirs in grads:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("query", "mask"),
    [
        ((2, 3, 5, 8), (2, 3, 5, 5)),
        ((2, 3, 5, 8), (2, 1, 1, 5)),
        ((2, 3, 5, 8), (3, 5, 5)),
        ((2, 4, 3, 5, 8), (4, 3, 5, 5)),
        ((2, 4, 3, 5, 8), (2, 1, 3, 5, 5)),
        ((2, 4, 3, 5, 8), (1, 1, 1, 5, 5)),
        ((3, 5, 8), (3, 5, 5)),
    ],
)
def test_leading_dimensions_of_the_mask(backend, query, mask):
    x, attn_mask = leaves(query, mask)
    ours = fastattn.scaled_dot_product_attention(x, x, x, attn_mask, backend=backend)
    torchs = F.scaled_dot_product_attention(x, x, x, attn_mask)
    torch.testing.assert_close(ours, torchs)
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), (x, attn_mask)),
        torch.autograd.grad(torchs.square().sum(), (x, attn_mask)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_rows_that_the_mask_hides(backend):
    (x,) = leaves((2, 3, 5, 8))
    attn_mask = torch.ones(5, 5, dtype=torch.bool)
    attn_mask[2] = False
    ours = fastattn.scaled_dot_product_attention(x, x, x, attn_mask, backend=backend)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(x, x, x, attn_mask))
    assert (ours[:, :, 2] == 0).all()


def test_dropout_drops_its_share(backend):
    x = torch.ones(4, 4, 64, 64)
    kept = fastattn.scaled_dot_product_attention(x, x, x, dropout_p=0.25, backend=backend)
    assert abs(kept.mean().item() - 1) < 0.02
    assert kept.std() > 0


# ------------------------------------------------------------------------ edges that kernels lose


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, 1e18, -1e18])
def test_lse_that_has_no_room_for_the_sum(backend, value):
    """Equal scores so large that lse rounds the log of the row's sum away, gradients included."""
    q, k, v = leaves((1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8), dtype=torch.float32)
    out = fastattn.attention(q, k, v, bias=torch.full((4, 5), value), backend=backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, torch.full_like(v, 4 / 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_that_cancel(backend, dtype):
    """dp - delta is a small difference of large numbers, and a slope's gradient sums the rest: an
    output that was rounded to 16 bits must not be what delta is made of."""
    shapes = (4, 4, 33, 8), (4, 2, 30, 8), (4, 2, 30, 8), (4,)
    *qkv, slopes = (x.detach() for x in leaves(*shapes, dtype=torch.float32))
    inputs = {name: x.to(dtype).requires_grad_() for name, x in zip("qkv", qkv, strict=True)}
    inputs["alibi_slopes"] = slopes.requires_grad_()
    dout = (leaves((4, 4, 33, 8), dtype=torch.float32, seed=1)[0].detach().to(dtype),)
    got, naive, exact = (
        testing.run(function, tensors, dout, ("out",))
        for function, tensors in (
            (functools.partial(fastattn.attention, backend=backend), inputs),
            (testing.naive_attention, inputs),
            (
                functools.partial(fastattn.attention, backend="reference"),
                testing.cast(inputs, torch.float64),
            ),
        )
    )
    testing.assert_laws(got, naive, exact)


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "values"])
def test_nothing_to_do(backend, empty):
    batch, heads, q_len, k_len, v_dim = (
        0 if empty == name else n
        for name, n in (("batch", 2), ("heads", 3), ("queries", 4), ("keys", 5), ("values", 6))
    )
    q, k, v, sinks = leaves(
        (batch, heads, q_len, 8), (batch, heads, k_len, 8), (batch, heads, k_len, v_dim), (heads,)
    )
    out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    assert out.shape == (batch, heads, q_len, v_dim) and lse.shape == (batch, heads, q_len)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks))
    for grad, leaf in zip(grads, (q, k, v, sinks), strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()
        if empty != "values":
            assert leaf is sinks or (grad == 0).all()
    if empty == "keys":
        assert (out == 0).all() and torch.equal(lse, sinks[None, :, None].expand_as(lse))
