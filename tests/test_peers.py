"""What the tests of torch's own attention, of flash-attention and of Liger's norms exercise, by every
backend: their shapes, masks and formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import testing

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
ALL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*shapes, dtype=torch.float32):
    return [randn(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)]


# -------------------------------------------------------------------------------- flash-attention

LENGTHS = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1023, 1024)]
LENGTHS += [(1, 147), (147, 1), (64, 128), (239, 1)]


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS, ids=str)
@pytest.mark.parametrize("variant", ["full", "causal", "local", "alibi", "softcap"])
@HALVES
def test_lengths(dtype, variant, q_len, k_len, backend):
    heads, kv_heads, dim = (2, 1, 32) if q_len * k_len > 10**5 else (6, 2, 59)
    keywords = {
        "full": {},
        "causal": {"causal": True},
        "local": {"window": (k_len // 3, 17)},
        "alibi": {"causal": True, "alibi_slopes": torch.rand(1, heads) * 0.3},
        "softcap": {"softcap": 15.0, "causal": True},
    }[variant]
    shapes = ((1, heads, q_len, dim), (1, kv_heads, k_len, dim), (1, kv_heads, k_len, dim))
    testing.check_attention(backend, *leaves(*shapes, dtype=dtype), **keywords)


WINDOWS = [(0, 0), (1, 1), (5, None), (None, 5), (31, 0), (0, 31), (300, 300), (-1, -1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(70, 103), (103, 70), (2, 103)])
def test_window_pairs(q_len, k_len, causal, window, backend):
    """Against a mask written out."""
    q, k, v = leaves((1, 2, q_len, 16), (1, 2, k_len, 16), (1, 2, k_len, 16))
    left, right = (math.inf if n in (None, -1) else n for n in window)
    offset = torch.arange(k_len) - torch.arange(q_len)[:, None] - (k_len - q_len)
    mask = (offset >= -left) & (offset <= (0 if causal else right))
    got = fastattn.attention(q, k, v, causal=causal, window=window, backend=backend)
    expected = fastattn.attention(q, k, v, bias=mask, backend=backend)
    torch.testing.assert_close(got, expected)
    dout = randn(*got.shape)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    )


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 50), (50, 50), (31, 77), (77, 31)])
def test_alibi_is_flash_attentions(q_len, k_len, causal, per_batch, backend):
    """Its bias is -slope * |i + Sk - Sq - j|."""
    q, k, v = leaves((2, 4, q_len, 16), (2, 4, k_len, 16), (2, 4, k_len, 16))
    slopes = torch.rand((2, 4) if per_batch else (4,))
    i, j = torch.arange(q_len)[:, None], torch.arange(k_len)
    bias = -slopes.expand(2, 4)[:, :, None, None] * (i + k_len - q_len - j).abs()
    got = fastattn.attention(q, k, v, causal=causal, alibi_slopes=slopes, backend=backend)
    expected = fastattn.attention(q, k, v, causal=causal, bias=bias, backend=backend)
    torch.testing.assert_close(got, expected)
    dout = randn(*got.shape)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    )


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_its_share(p, backend):
    """Within five standard deviations, and no row, column or head with a share of its own."""
    heads, length = 8, 256
    q = torch.zeros(2, heads, length, 1)
    v = torch.eye(length).expand(2, heads, length, length)
    kept = fastattn.attention(q, q, v, dropout_p=p, backend=backend) != 0
    for dims in [(0, 1, 2, 3), (2, 3), (0, 1, 3), (0, 1, 2), (0, 2, 3)]:
        share = kept.float().mean(dims)
        count = kept.numel() / max(share.numel(), 1)
        assert ((share - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p) / count)).all(), dims
    again = fastattn.attention(q, q, v, dropout_p=p, backend=backend) != 0
    assert 0.5 * p * (1 - p) < (kept != again).float().mean() < 4 * p * (1 - p)


def test_dropout_is_unbiased(backend):
    q, k, v = leaves((1, 2, 40, 16), (1, 2, 60, 16), (1, 2, 60, 16))
    plain = fastattn.attention(q, k, v, backend=backend)
    many = [fastattn.attention(q, k, v, dropout_p=0.3, backend=backend) for _ in range(600)]
    mean, spread = torch.stack(many).mean(0), torch.stack(many).std(0)
    assert ((mean - plain).abs() < 6 * spread / math.sqrt(600)).all()


# -------------------------------------------------------------------- scaled_dot_product_attention


def masks(batch, heads, q_len, k_len):
    """Masks as people make them: full, padding, broadcast, transposed, sliced, expanded."""
    full = randn(batch, heads, q_len, k_len) > -0.5
    padding = torch.arange(k_len) < torch.tensor([k_len, k_len // 2])[:batch, None]
    return {
        "full": full,
        "padding": padding[:, None, None, :],
        "padding_expanded": padding[:, None, None, :].expand(batch, heads, q_len, k_len),
        "one_batch": full[:1],
        "one_head": full[:, :1],
        "matrix": full[0, 0],
        "tril": torch.ones(q_len, k_len).tril().bool(),
        "transposed": (randn(batch, heads, k_len, q_len) > -0.5).mT,
        "sliced": (randn(batch, heads, q_len, 2 * k_len) > -0.5)[..., 1::2],
        "offset": (randn(batch, heads, q_len + 3, k_len + 3) > -0.5)[..., 3:, 3:],
        "keys_last": (randn(k_len, batch, heads, q_len) > -0.5).permute(1, 2, 3, 0),
        "queries_only": full[..., :1],
    }


@pytest.mark.parametrize("kind", masks(2, 3, 4, 5))
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 7), (1, 65), (70, 90)])
@ALL
def test_masks_as_torch(dtype, q_len, k_len, boolean, kind, backend):
    q, k, v = leaves((2, 3, q_len, 24), (2, 3, k_len, 24), (2, 3, k_len, 24), dtype=dtype)
    mask = masks(2, 3, q_len, k_len)[kind]
    if not boolean:
        strided = torch.empty_strided(mask.shape, mask.stride(), dtype=dtype)
        mask = torch.zeros_like(strided).masked_fill(~mask, -math.inf)
    got = fastattn.scaled_dot_product_attention(q, k, v, mask, backend=backend)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torchs = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(got, torchs, atol=tolerance, rtol=tolerance)
    dout = randn(*got.shape, dtype=dtype)
    grads = torch.autograd.grad(got, (q, k, v), dout)
    for mine, theirs in zip(grads, torch.autograd.grad(torchs, (q, k, v), dout), strict=True):
        assert mine.isfinite().all()
        if dtype is torch.float32:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 9, 31, 72, 96, 200])
@pytest.mark.parametrize("is_causal", [False, True])
def test_head_dims_as_torch(dim, is_causal, backend):
    q, k, v = leaves((2, 2, 33, dim), (2, 2, 50, dim), (2, 2, 50, dim + 3))
    got = fastattn.scaled_dot_product_attention(q, k, v, is_causal=is_causal, backend=backend)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", ["packed_qkv", "bshd", "kv_cache", "shared_kv"])
def test_projections_as_models_make_them(form, is_causal, backend):
    b, h, s, d = 2, 4, 45, 16
    if form == "packed_qkv":
        q, k, v = randn(b, s, 3, h, d).permute(2, 0, 3, 1, 4).unbind()
    elif form == "bshd":
        q, k, v = (randn(b, s, h, d, seed=i).transpose(1, 2) for i in range(3))
    elif form == "kv_cache":
        cache = randn(2, b, h, 3 * s, d)
        q, k, v = randn(b, h, s, d, seed=1), cache[0, :, :, :s], cache[1, :, :, :s]
    else:
        q = randn(b, h, s, d)
        k = v = randn(b, 1, s, d, seed=1).expand(b, h, s, d)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    got = fastattn.scaled_dot_product_attention(q, k, v, is_causal=is_causal, backend=backend)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(got, torchs)
    dout = randn(*got.shape)
    for mine, theirs in zip(
        torch.autograd.grad(got, (q, k, v), dout),
        torch.autograd.grad(torchs, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_multihead_attention_module(backend, monkeypatch):
    """torch.nn.MultiheadAttention, its attention swapped."""
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = randn(2, 11, 32)
    padding = torch.arange(11)[None] >= torch.tensor([11, 6])[:, None]
    expected, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
    calls = []

    def ours(*args, **keywords):
        calls.append(1)
        return fastattn.scaled_dot_product_attention(*args, **keywords, backend=backend)

    monkeypatch.setattr(F, "scaled_dot_product_attention", ours)
    got, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
    assert calls
    torch.testing.assert_close(got, expected)


# --------------------------------------------------------------------------------- norms, softmax

ROWS = [(2, 8), (9, 41), (4, 128, 512), (3, 7, 2048), (1, 1, 8192), (1023, 257)]


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("rms", [False, True])
@ALL
def test_norms(dtype, rms, shape, backend):
    x, weight = leaves(shape, shape[-1:], dtype=dtype)
    testing.check_layer_norm(backend, x, shape[-1:], weight, rms=rms, eps=1e-6)


@pytest.mark.parametrize(
    ("offset", "scale"), itertools.product([0.0, 3.0, 100.0], [1e-4, 1.0, 1e4])
)
def test_norms_of_any_magnitude(offset, scale, backend):
    x = (scale * (randn(37, 333) + offset)).requires_grad_()
    testing.check_layer_norm(backend, x, (333,), *leaves((333,), (333,)))


@pytest.mark.parametrize(
    "shape", [(1, 2), (9, 41), (4, 128, 512), (17, 30522), (3, 50257)], ids=str
)
@pytest.mark.parametrize("log", [False, True])
@HALVES
def test_vocabularies(dtype, log, shape, backend):
    testing.check_softmax(backend, (8 * randn(*shape, dtype=dtype)).requires_grad_(), log=log)
