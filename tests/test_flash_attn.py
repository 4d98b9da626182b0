"""fastattn.compat.flash_attn: flash-attention 2's names, order, layout and results."""

import inspect
import math

import pytest
import torch

import fastattn
from fastattn.compat import flash_attn
from fastattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TAIL = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"]
TAIL += ["deterministic", "return_attn_probs"]
DEFAULTS = (0.0, None, False, (-1, -1), 0.0, None, False, False)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """flash-attention's own test's: (B, S, H, D), everything in float64, heads repeated."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    offset = (
        torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    )
    if slopes is not None:
        scores = scores - slopes.double()[..., None, None] * offset.abs()
    left, right = (math.inf if n < 0 else n for n in window)
    seen = (offset >= -left) & (offset <= (0 if causal else right))
    p = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0)
    return (p @ v).transpose(1, 2), scores.masked_fill(~seen, -math.inf).logsumexp(-1)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (flash_attn_func, ["q", "k", "v"]),
        (flash_attn_kvpacked_func, ["q", "kv"]),
        (flash_attn_qkvpacked_func, ["qkv"]),
    ],
)
def test_signatures(function, tensors):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == tensors + TAIL
    assert tuple(p.default for p in parameters.values())[len(tensors) :] == DEFAULTS
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


VARIANTS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "causal_window": {"causal": True, "window": (4, 0)},
    "softcap": {"softcap": 5.0},
    "alibi": {"causal": True, "slopes": torch.tensor([0.3, 0.1, 0.7, 0.2])},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 9), (9, 5), (1, 7), (6, 6)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@DTYPES
def test_results(dtype, kv_heads, q_len, k_len, variant):
    q = randn(2, q_len, 4, 8, dtype=dtype)
    k, v = (randn(2, k_len, kv_heads, 8, dtype=dtype, seed=i) for i in (1, 2))
    expected, expected_lse = reference(q, k, v, **variant)
    names = {"window": "window_size", "slopes": "alibi_slopes", "scale": "softmax_scale"}
    keywords = {names.get(name, name): value for name, value in variant.items()}
    out, lse, dropped = flash_attn_func(q, k, v, **keywords, return_attn_probs=True)
    assert out.dtype is dtype and lse.dtype is torch.float32 and dropped is None
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert torch.equal(flash_attn_func(q, k, v, **keywords), out)
    kv = torch.stack((k, v), 2)
    assert torch.equal(flash_attn_kvpacked_func(q, kv, **keywords), out)


def test_packed_queries_keys_and_values_and_their_gradient():
    qkv = randn(2, 6, 3, 4, 8).requires_grad_()
    out, lse, dropped = flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    apart = flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(out, apart) and lse.shape == (2, 4, 6) and dropped is None
    grads = [torch.autograd.grad(o.square().sum(), qkv)[0] for o in (out, apart)]
    assert torch.equal(*grads) and grads[0].shape == qkv.shape


def test_by_position():
    q, k, v = (randn(2, 6, 4, 8, seed=i) for i in range(3))
    slopes = torch.rand(4)
    got = flash_attn_func(q, k, v, 0.0, 0.5, True, (3, -1), 9.0, slopes, True, False)
    expected = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=0.5,
        causal=True,
        window_size=(3, -1),
        softcap=9.0,
        alibi_slopes=slopes,
    )
    assert torch.equal(got, expected)


def test_no_copies():
    """What reaches the kernel is the caller's memory, and the output lies as they have it."""
    qkv = randn(2, 6, 3, 4, 8)
    seen = []
    spec = fastattn.ops.attention.AttentionSpec
    original = spec.of
    try:
        spec.of = lambda q, k, v, *rest, **kw: (
            seen.append((q, k, v)) or original(q, k, v, *rest, **kw)
        )
        out = flash_attn_qkvpacked_func(qkv)
    finally:
        spec.of = original
    assert all(x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in seen[0])
    assert out.shape == (2, 6, 4, 8) and out.is_contiguous()


def test_dropped_probabilities():
    q, k, v = (randn(2, 6, 4, 8, seed=i) for i in range(3))
    torch.manual_seed(3)
    out, lse, dropped = flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    assert dropped.shape == (2, 4, 6, 6) and not dropped.requires_grad
    p, _, _ = (x.double() for x in (dropped.abs(), out, lse))
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    kept = torch.where(dropped > 0, dropped, 0.0) / 0.6
    torch.testing.assert_close((kept @ v.transpose(1, 2)).transpose(1, 2), out)
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, 0.4, causal=True), out)
    q.requires_grad_()
    torch.manual_seed(3)
    grads = [torch.autograd.grad(flash_attn_func(q, k, v, 0.4, causal=True).sum(), q)[0]]
    torch.manual_seed(3)
    out, *_ = flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], grads[0])


def test_autocast_and_compile():
    q, k, v = (randn(2, 6, 4, 8, seed=i).requires_grad_() for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        for p in (0.0, 0.1):
            assert flash_attn_func(q, k, v, p, return_attn_probs=True)[0].dtype is torch.bfloat16

    def step(q, k, v):
        return flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0].square().sum()

    torch._dynamo.reset()
    results = [
        torch.autograd.grad(call(q, k, v), (q, k, v))
        for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: flash_attn_func(randn(2, 6, 8), *[randn(2, 6, 4, 8)] * 2), ValueError, r"q: expected shape \(batch, sequence, heads"),
        (lambda: flash_attn_kvpacked_func(randn(2, 6, 4, 8), randn(2, 6, 3, 4, 8)), ValueError, "kv: expected shape"),
        (lambda: flash_attn_qkvpacked_func(randn(2, 6, 2, 4, 8)), ValueError, "qkv: expected shape"),
        (lambda: flash_attn_func(*[randn(2, 6, 4, 8)] * 3, causal=1), TypeError, "causal: expected a bool"),
        (lambda: flash_attn_func(*[randn(2, 6, 4, 8)] * 3, dropout_p=2.0), ValueError, "dropout_p: expected"),
        (lambda: flash_attn_func(*[randn(2, 6, 4, 8)] * 3, window_size=3), TypeError, "window_size: expected"),
        (lambda: flash_attn_func(*[randn(2, 6, 4, 8)] * 3, softmax_scale="1"), TypeError, "softmax_scale: expected"),
        (lambda: flash_attn_kvpacked_func(randn(2, 6, 4, 8), randn(1, 6, 2, 4, 8)), ValueError, "kv: expected q's batch"),
        (lambda: flash_attn_qkvpacked_func(randn(2, 6, 3, 4, 8).int()), TypeError, "qkv: expected float32"),
        (lambda: flash_attn_func([1], *[randn(2, 6, 4, 8)] * 2), TypeError, "q: expected a torch.Tensor"),
    ],
)  # fmt: skip
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_negative_softcap_is_none():
    q = randn(2, 6, 4, 8)
    assert torch.equal(flash_attn_func(q, q, q, softcap=-1.0), flash_attn_func(q, q, q))


def test_a_window_in_a_tensor():
    q = randn(2, 6, 4, 8)
    expected = flash_attn_func(q, q, q, window_size=(2, 1))
    assert torch.equal(flash_attn_func(q, q, q, window_size=torch.tensor([2, 1])), expected)


def test_names():
    assert set(flash_attn.__all__) == {
        "flash_attn_func",
        "flash_attn_kvpacked_func",
        "flash_attn_qkvpacked_func",
    }
