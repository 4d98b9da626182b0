"""Attention's CUDA kernels where the case table does not lead them: infinities and NaNs, logits out
of reach, split keys, repeats, in the dtypes that they serve."""

import itertools
import math

import pytest
import torch

import fastattn
from fastattn import dispatch, proof, testing
from fastattn.cases import AttentionCase

BACKEND = dispatch.BACKENDS["cuda"]
DTYPES = (torch.bfloat16, torch.float16)


def attention(q, k, v, **keywords):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with testing.poisoned_empty():
        out, lse = fastattn.attention(*inputs, return_lse=True, backend="cuda", **keywords)
        ones = (torch.ones_like(out), torch.ones_like(lse))
        return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, ones)


def numbers(q_len, k_len, heads=2, kv_heads=2, dtype=torch.bfloat16, dim=16):
    g = torch.Generator().manual_seed(0)
    shapes = ((1, heads, q_len, dim), (1, kv_heads, k_len, dim), (1, kv_heads, k_len, dim))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_whole_tiles(head_dim):
    """Every head dim that has tiles of its own, whose rows fill them."""
    case = AttentionCase("whole", q_len=70, k_len=90, head_dim=head_dim, batch=1, causal=True)
    assert not proof.prove(case.with_dtype(torch.bfloat16), "cuda").problem


# ------------------------------------------------------------------------------ what must not leak


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("length", [40, 200])
def test_a_nan_stays_where_it_is_seen(name, value, length):
    inputs = dict(zip("qkv", numbers(length, length), strict=True))
    clean = attention(**inputs, causal=True)
    at = length // 2
    dirty = {n: x.clone() for n, x in inputs.items()}
    dirty[name][:, :, at, 3] = value
    touched = torch.arange(length) == at if name == "q" else torch.arange(length) >= at
    out, lse, dq, dk, dv = attention(**dirty, causal=True)
    if value != value:
        assert torch.equal(out[0, 0].isnan().any(-1), touched)
    for got, same in ((out, clean[0]), (lse, clean[1]), (dq, clean[2])):
        torch.testing.assert_close(got[:, :, ~touched], same[:, :, ~touched], rtol=0.02, atol=8e-3)
    if name == "q":  # the keys that the query does not see
        for got, same in ((dk, clean[3]), (dv, clean[4])):
            torch.testing.assert_close(
                got[:, :, at + 1 :], same[:, :, at + 1 :], rtol=0.02, atol=8e-3
            )


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_nan_behind_a_mask(kind):
    q, k, v = numbers(70, 90)
    mask = torch.ones(70, 90, dtype=torch.bool)
    mask[::2, 50] = False
    bias = mask if kind == "boolean" else torch.zeros(70, 90).masked_fill(~mask, -math.inf)
    clean = attention(q, k, v, bias=bias)
    v[:, :, 50] = math.nan
    out, lse, dq, *_ = attention(q, k, v, bias=bias)
    assert out[:, :, 1::2].isnan().all()
    for got, same in ((out, clean[0]), (lse, clean[1]), (dq, clean[2])):
        torch.testing.assert_close(got[:, :, ::2], same[:, :, ::2], rtol=0.02, atol=8e-3)


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("size", [1e3, 1e9, 1e15])
def test_logits_out_of_reach(size, length):
    q, k, v = numbers(length, 70)
    out, lse, *grads = attention(q * size, k * size, v)
    scores = (q * size).double() @ (k * size).double().mT
    weights = torch.softmax(scores * 0.25, -1)
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=0.02, atol=0.02)
    assert all(x.isfinite().all() for x in (lse, *grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smallest_bias_everywhere_is_a_mean(dtype):
    q, k, v = numbers(70, 90, dtype=dtype)
    bias = torch.full((70, 90), torch.finfo(torch.float32).min)
    out, _, _, _, dv = attention(q, k, v, bias=bias)
    mean = v.double().mean(2, keepdim=True).expand(out.shape)
    torch.testing.assert_close(out.double(), mean, rtol=0.01, atol=2e-3)
    torch.testing.assert_close(dv, torch.full_like(dv, 70 / 90), rtol=0.01, atol=0)


def test_an_infinite_logit_is_nan():
    q, k, v = numbers(40, 70)
    bias = torch.zeros(40, 70)
    bias[7, 33] = math.inf
    out, *_ = attention(q, k, v, bias=bias)
    assert torch.equal(out[0, 0].isnan().all(-1), torch.arange(40) == 7)


# ---------------------------------------------------------------------------------- parts, repeats


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["grouped", "long", "window", "smallest", "nan"])
def test_split_keys(kind, parts, monkeypatch):
    module = BACKEND.module

    class Split:
        """The module, with another plan; the last parts may be empty."""

        def __getattr__(self, name):
            return getattr(module, name)

        def attention_forward_plan(self, call, out, lse):
            return parts, lse.numel() * parts * (call.v.shape[3] + 2)

    monkeypatch.setattr(BACKEND, "module", Split())
    q, k, v = numbers(70 if kind == "long" else 3, 250, heads=4)
    keywords = {"sinks": torch.randn(4)}
    if kind == "window":  # most parts see nothing
        keywords["window"] = (40, 0)
    if kind == "smallest":  # maxima whose differences say nothing: the sums have to
        keywords = {"bias": torch.full((3, 250), torch.finfo(torch.float32).min)}
    if kind == "nan":
        v[:, 0, 200] = math.nan
    mine = fastattn.attention(q, k, v, return_lse=True, backend="cuda", **keywords)
    same = fastattn.attention(q, k, v, return_lse=True, backend="reference", **keywords)
    for x, y in zip(mine, same, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=8e-3, equal_nan=True)


def test_repeats_to_the_bit():
    case = AttentionCase("twice", heads=4, kv_heads=2, causal=True, bias="additive", sinks=True)
    inputs = case.with_dtype(torch.bfloat16).make_inputs(requires_grad=True)
    first, second = (testing.check_attention("cuda", **inputs, causal=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


VARIANTS = {
    "causal": {"causal": True},
    "window": {"window": (20, 9)},
    "softcap": {"softcap": 3.0, "magnitude": 3.0},
    "alibi": {"alibi": "batch_heads"},
    "bias": {"bias": "additive", "bias_shape": "1hqk"},
    "bias_keys": {"bias": "-inf", "bias_shape": "b11k"},
    "bias_queries": {"bias": "additive", "bias_shape": "1hq1", "sinks": True},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.25},
    "gqa": {"kv_heads": 2},
    "value_dim": {"value_dim": 33},
    "column": {"layout": "column"},
}
PAIRS = [
    pair
    for pair in itertools.combinations(VARIANTS, 2)
    if not VARIANTS[pair[0]].keys() & VARIANTS[pair[1]].keys()
]


@pytest.mark.parametrize("q_len", [2, 71])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_of_variants(pair, q_len):
    fields = {"q_len": q_len, "k_len": 85, "head_dim": 20, "heads": 8, "batch": 1}
    case = AttentionCase("+".join(pair), **fields | VARIANTS[pair[0]] | VARIANTS[pair[1]])
    with testing.poisoned_empty():
        verdict = proof.prove(case.with_dtype(torch.bfloat16), "cuda")
    assert verdict.passed and not verdict.refusal, verdict
