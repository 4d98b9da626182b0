"""Attention at its edges, by every backend: the right answers where others give NaN or an error."""

import math

import pytest
import torch
import torch.nn.functional as F
from here import INTERPRETED

import fastattn
from fastattn import testing
from fastattn.cases import DTYPES

INF = math.inf
# More queries than keys, and several tiles of both: the interpreter's are small, and slow.
LARGE = (70, 65) if INTERPRETED else (300, 250)
lengths = pytest.mark.parametrize(("q_len", "k_len"), [(6, 4), (70, 40), LARGE])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def qkv(q_len=4, k_len=4, dim=8, dtype=torch.float32, heads=2, batch=1):
    g = torch.Generator().manual_seed(0)
    sizes = (q_len, k_len, k_len)
    return [torch.randn(batch, heads, n, dim, generator=g).to(dtype) for n in sizes]


def attention(q, k, v, backend, **keywords):
    """(out, lse, dq, dk, dv) from a gradient of ones for out and lse."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with testing.poisoned_empty():
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **keywords)
        ones = (torch.ones_like(out), torch.ones_like(lse))
        grads = torch.autograd.grad((out, lse), (q, k, v), ones)
    return out.detach(), lse.detach(), *grads


# ------------------------------------------------------------------------------ rows without keys


def blind(kind, q_len, k_len):
    """Keywords that hide every key from query 0, where there are fewer keys than queries."""
    mask = torch.ones(q_len, k_len, dtype=torch.bool)
    mask[0] = False
    return {
        "causal": {"causal": True},
        "window": {"window": (0, 0)},
        "mask": {"bias": mask},
        "bias": {"bias": torch.zeros(q_len, k_len).masked_fill(~mask, -INF)},
        "capped": {"bias": mask, "softcap": 5.0},
        "alibi": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25])},
    }[kind]


BLIND = pytest.mark.parametrize("kind", ["causal", "window", "mask", "bias", "capped", "alibi"])


@lengths
@dtypes
@BLIND
def test_row_that_sees_no_key(kind, dtype, q_len, k_len, backend):
    q, k, v = qkv(q_len, k_len, dtype=dtype)
    out, lse, dq, dk, dv = attention(q, k, v, backend, **blind(kind, q_len, k_len))
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -INF).all()
    assert (dq[:, :, 0] == 0).all()
    assert all(x.isfinite().all() for x in (out, lse[:, :, -1], dq, dk, dv))


@lengths
@BLIND
def test_row_that_sees_only_a_sink(kind, q_len, k_len, backend):
    sinks = torch.tensor([0.5, -2.0])
    keywords = blind(kind, q_len, k_len)
    out, lse, *grads = attention(*qkv(q_len, k_len), backend, sinks=sinks, **keywords)
    assert (out[:, :, 0] == 0).all()
    assert torch.equal(lse[:, :, 0], sinks[None])
    assert all(x.isfinite().all() for x in grads)


@lengths
def test_no_row_sees_a_key(q_len, k_len, backend):
    q, k, v = qkv(q_len, k_len)
    mask = torch.zeros(k_len, dtype=torch.bool)
    out, lse, *grads = attention(q, k, v, backend, bias=mask)
    assert (out == 0).all() and (lse == -INF).all()
    assert all((x == 0).all() for x in grads)
    bias = torch.full((q_len, k_len), -INF, requires_grad=True)
    out = fastattn.attention(q, k, v, bias=bias, backend=backend)
    assert (torch.autograd.grad(out.sum(), bias)[0] == 0).all()


def test_sink_of_minus_infinity_is_no_sink(backend):
    q, k, v = qkv(20, 12)
    sinks = torch.full((2,), -INF, requires_grad=True)
    out, lse = fastattn.attention(
        q, k, v, sinks=sinks, causal=True, return_lse=True, backend=backend
    )
    plain, plain_lse, *_ = attention(q, k, v, backend, causal=True)
    torch.testing.assert_close(out.detach(), plain)
    torch.testing.assert_close(lse.detach(), plain_lse)
    assert (torch.autograd.grad(out.sum() + lse[:, :, 8:].sum(), sinks)[0] == 0).all()


@lengths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_smallest_bias_everywhere_is_a_mean(dtype, q_len, k_len, backend):
    q, k, v = qkv(q_len, k_len, dtype=dtype)
    bias = torch.full((q_len, k_len), torch.finfo(dtype).min, dtype=dtype)
    out, _, _, _, dv = attention(q, k, v, backend, bias=bias)
    mean = v.double().mean(2, keepdim=True).to(dtype).expand_as(out)
    torch.testing.assert_close(out, mean)
    torch.testing.assert_close(dv, torch.full_like(dv, q_len / k_len))


# ------------------------------------------------------------------------------------ empty inputs


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 2.0])], ids=["plain", "sinks"])
@pytest.mark.parametrize("q_len", [1, 4, 50])
def test_no_keys(q_len, sinks, backend):
    q, k, v = qkv(q_len, 0)
    out, lse, dq, dk, dv = attention(q, k, v, backend, sinks=sinks)
    assert (out == 0).all() and out.shape == q.shape
    expected = torch.tensor([-INF] * 2) if sinks is None else sinks
    assert torch.equal(lse, expected[None, :, None].expand_as(lse))
    assert (dq == 0).all() and dq.shape == q.shape
    assert dk.shape == k.shape and dv.shape == v.shape


@pytest.mark.parametrize("dim", range(4))
@dtypes
def test_an_empty_dimension(dim, dtype, backend):
    """No batch, no heads, no queries, no value columns; with every gradient there could be."""
    sizes = {0: {"batch": 0}, 1: {"heads": 0}, 2: {"q_len": 0}, 3: {}}[dim]
    q, k, v = qkv(**sizes, dtype=dtype)
    v = v[..., :0] if dim == 3 else v
    bias = torch.zeros(1, q.shape[1], 1, 4, requires_grad=True)
    sinks = torch.zeros(q.shape[1], requires_grad=True)
    inputs = [*(x.requires_grad_() for x in (q, k, v)), bias, sinks]
    out, lse = fastattn.attention(
        q, k, v, bias=bias, sinks=sinks, return_lse=True, dropout_p=0.2, backend=backend
    )
    assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]
    grads = torch.autograd.grad((out.sum(), lse.sum()), inputs)
    for x, dx in zip(inputs, grads, strict=True):
        assert dx.shape == x.shape and dx.isfinite().all()
        assert dim == 3 or (dx == 0).all()


# ----------------------------------------------------------------------------- NaN and infinities

HIDDEN = {  # keywords and dense mask, by (q_len, k_len)
    "causal": lambda m, n: ({"causal": True}, torch.ones(m, n).tril(n - m).bool()),
    "window": lambda m, n: (
        {"window": (2, 1)},
        torch.ones(m, n).tril(n - m + 1).triu(n - m - 2).bool(),
    ),
    "mask": lambda m, n: ({"bias": checkers(m, n)}, checkers(m, n)),
    "bias": lambda m, n: (
        {"bias": torch.zeros(m, n).masked_fill(~checkers(m, n), -INF)},
        checkers(m, n),
    ),
    "capped": lambda m, n: (
        {"causal": True, "softcap": 3.0, "alibi_slopes": torch.tensor([0.1, 0.2])},
        torch.ones(m, n).tril(n - m).bool(),
    ),
    "capped_mask": lambda m, n: ({"bias": checkers(m, n), "softcap": 3.0}, checkers(m, n)),
    "dropout": lambda m, n: (
        {"causal": True, "dropout_p": 0.01},
        torch.ones(m, n).tril(n - m).bool(),
    ),
}


def checkers(m, n):
    """Each query sees two keys of three, and each key is hidden from a query of three."""
    return (torch.arange(m)[:, None] + torch.arange(n)) % 3 > 0


@pytest.mark.parametrize("value", [math.nan, INF], ids=str)
@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize(("q_len", "k_len"), [(4, 4), (5, 70), (40, 40), LARGE[::-1]])
@pytest.mark.parametrize("kind", HIDDEN)
def test_nan_reaches_the_rows_that_see_it_and_no_other(kind, q_len, k_len, name, value, backend):
    keywords, visible = HIDDEN[kind](q_len, k_len)
    clean = dict(zip("qkv", qkv(q_len, k_len), strict=True))
    at = q_len // 2 if name == "q" else k_len // 2
    dirty = {n: x.clone() for n, x in clean.items()}
    dirty[name][:, :, at, 3] = value
    touched = visible[:, at].clone()
    if name == "q":
        touched = (torch.arange(q_len) == at) & visible.any(1)
    seen = visible[touched].any(0)  # keys that a touched row sees: their gradients may be NaN

    def run(inputs):
        torch.manual_seed(0)
        return attention(**inputs, backend=backend, **keywords)

    out, lse, dq, dk, dv = run(dirty)
    expected = run(clean)
    if math.isnan(value):
        found = out[0, 0].isnan().any(-1)
        if "dropout_p" in keywords:
            assert not found[~touched].any()
            assert found[touched].float().mean() > 0.8
        else:
            assert torch.equal(found, touched)
    for got, same, clear in (
        (out, expected[0], ~touched),
        (lse, expected[1], ~touched),
        (dq, expected[2], ~touched),
        (dk, expected[3], ~seen),
        (dv, expected[4], ~seen),
    ):
        torch.testing.assert_close(got[:, :, clear], same[:, :, clear])


def test_infinite_value_behind_the_mask(backend):
    q, k, v = qkv()
    v[:, :, 3] = INF
    out, _, dq, *_ = attention(q, k, v, backend, causal=True)
    assert out[:, :, :3].isfinite().all() and dq[:, :, :3].isfinite().all()
    assert (out[:, :, 3] == INF).all()


@lengths
def test_infinite_logit_is_nan(q_len, k_len, backend):
    q, k, v = qkv(q_len, k_len)
    bias = torch.zeros(q_len, k_len)
    bias[1, 2] = INF
    out, *_ = attention(q, k, v, backend, bias=bias)
    torchs = F.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(out, torchs, equal_nan=True)
    assert out[:, :, 1].isnan().all() and out[:, :, [0, *range(2, q_len)]].isfinite().all()


def test_nan_bias_reaches_its_row_alone(backend):
    q, k, v = qkv(20, 20)
    bias = torch.zeros(20, 20)
    bias[5, 3] = bias[7, 19] = math.nan  # the causal mask hides the second
    out, *_ = attention(q, k, v, backend, bias=bias, causal=True)
    assert out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == [5]


# ----------------------------------------------------------------------------- magnitudes, scores


@lengths
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1e3, 1e9, 1e15])
def test_huge_logits_are_finite(size, causal, q_len, k_len, backend):
    q, k, v = qkv(q_len, k_len)
    for x in attention(q * size, k * size, v, backend, causal=causal):
        assert not x.isnan().any()
    out, *_ = attention(q * size, k * size, v, backend)
    best = (q.double() @ k.double().mT).argmax(-1)  # all the weight on one key
    hit = torch.gather(v, 2, best[..., None].expand_as(out))
    torch.testing.assert_close(out, hit, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [4, 40])
def test_products_beyond_float16(length, backend):
    q, k, v = (torch.full((1, 2, length, 64), 256.0, dtype=torch.float16) for _ in range(3))
    out, lse, *grads = attention(q, k, v, backend)
    assert (out == 256).all() and lse.isfinite().all()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("length", [4, 40])
def test_softcap_comes_before_the_mask(length, backend):
    q, k, v = qkv(length, length)
    mask = torch.arange(length) != 2
    out, *_ = attention(q * 100, k, v, backend, softcap=2.0, bias=mask)
    v[:, :, 2] = 1e6
    torch.testing.assert_close(
        out, attention(q * 100, k, v, backend, softcap=2.0, bias=mask)[0], rtol=0, atol=0
    )


@pytest.mark.parametrize("length", [4, 40])
def test_scale_zero_is_a_mean(length, backend):
    q, k, v = qkv(length, length)
    out, lse, dq, dk, _ = attention(q, k, v, backend, scale=0.0)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(length)))
    assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("length", [4, 40])
def test_negative_scale_is_negative_queries(length, backend):
    q, k, v = qkv(length, length)
    negative = attention(q, k, v, backend, scale=-0.4, causal=True)[:2]
    expected = attention(-q, k, v, backend, scale=0.4, causal=True)[:2]
    torch.testing.assert_close(negative, expected)


@pytest.mark.parametrize("length", [4, 40])
def test_dropping_everything(length, backend):
    out, lse, dq, dk, dv = attention(*qkv(length, length), backend, dropout_p=1.0)
    assert (out == 0).all() and lse.isfinite().all() and (dv == 0).all()
    _, _, lse_dq, lse_dk, _ = attention(*qkv(length, length), backend)
    assert dq.isfinite().all() and dk.isfinite().all()
    assert lse_dq.shape == dq.shape and lse_dk.shape == dk.shape


# --------------------------------------------------------------------------------------- addresses


def far_apart(shape, dtype, dim):
    """A tensor that ends 2**31 elements from its beginning, along ``dim``; only its own pages
    exist. Where there are many, each stride is a number of 32 bits, and its multiples are not."""
    step = 2**31 // (shape[dim] - 1) + 7
    base = torch.empty((shape[dim] - 1) * step + math.prod(shape) + 1, dtype=dtype)
    strides = list(torch.empty(shape, device="meta").stride())
    strides[dim] = step
    x = base.as_strided(shape, strides, 1)
    return x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("q_len", [2, 40])
def test_offsets_beyond_32_bits(q_len, dim, backend):
    q = far_apart((2, 4, q_len, 16), torch.bfloat16, dim)
    k, v = (far_apart((2, 2, 40, 16), torch.bfloat16, dim) for _ in range(2))
    got = attention_without_poison(q, k, v, backend)
    expected = attention_without_poison(*(x.contiguous() for x in (q, k, v)), backend)
    for mine, same in zip(got, expected, strict=True):
        assert torch.equal(mine, same)


def attention_without_poison(q, k, v, backend):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = fastattn.attention(q, k, v, causal=True, backend=backend)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


@dtypes
@pytest.mark.parametrize("q_len", [1, 30])
def test_unaligned_pointers(q_len, dtype, backend):
    """Every offset from a cache line that an element can have."""
    q, k, v = qkv(q_len, 37, dim=17, dtype=dtype)
    expected = attention(q, k, v, backend)[:2]
    for offset in range(1, 64 // dtype.itemsize, 3):
        moved = []
        for x in (q, k, v):
            memory = torch.empty(x.numel() + offset, dtype=dtype)
            moved.append(memory[offset:].view(x.shape).copy_(x))
        for mine, same in zip(attention(*moved, backend)[:2], expected, strict=True):
            torch.testing.assert_close(mine, same, msg=f"offset {offset}")


def test_inputs_are_left_alone(backend):
    q, k, v = qkv(40, 50)
    bias, sinks, slopes = torch.randn(40, 50), torch.randn(2), torch.rand(2)
    before = [x.clone() for x in (q, k, v, bias, sinks, slopes)]
    attention(q, k, v, backend, bias=bias, sinks=sinks, alibi_slopes=slopes, causal=True)
    for x, same in zip((q, k, v, bias, sinks, slopes), before, strict=True):
        assert torch.equal(x, same)
