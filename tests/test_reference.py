"""The oracle itself: against the definition in plain loops, and row by row of the edge cases."""

import math

import pytest
import torch

import fastattn
from fastattn import reference, testing

INF = math.inf


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # known answers, from Random123
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 2,
            (0xFFFFFFFF,) * 4,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, words):
    seed = key[1] << 32 | key[0]
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    got = reference.philox(seed, *(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in got) == words


def test_dropout_counters():
    """Element (b, h, i, j) is word j & 3 of counter (j >> 2, i, h, b), at least p * 2**32."""
    seed, p = torch.tensor(1234567890123456789), 0.3
    keep = reference.attention_dropout_keep(seed, p, 2, 3, 4, 10)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 9), (1, 0, 2, 7), (0, 1, 3, 4)):
        counter = (torch.tensor(c) for c in (j >> 2, i, h, b))
        word = reference.philox(seed, *counter)[j & 3]
        assert bool(keep[b, h, i, j]) == (int(word) >= int(p * 2**32))
    rows = reference.row_dropout_keep(seed, p, 5, 7)
    word = reference.philox(seed, *(torch.tensor(c) for c in (6 >> 2, 4, 0, 0)))[6 & 3]
    assert rows.shape == (5, 7) and bool(rows[4, 6]) == (int(word) >= int(p * 2**32))


def loops(q, k, v, mask, scale, softcap, slopes, shift, bias, sinks):
    """Attention of one head, number by number, in Python floats."""
    out, lse = [], []
    for i in range(len(q)):
        scores = {}
        for j in range(len(k)):
            if not mask[i][j]:
                continue
            s = scale * sum(a * b for a, b in zip(q[i], k[j], strict=True))
            s = softcap * math.tanh(s / softcap)
            scores[j] = s - slopes * abs(i + shift - j) + bias[i][j]
        total = math.exp(sinks) + sum(math.exp(s) for s in scores.values())
        lse.append(math.log(total))
        weights = {j: math.exp(s) / total for j, s in scores.items()}
        out.append([sum(p * v[j][d] for j, p in weights.items()) for d in range(len(v[0]))])
    return out, lse


def test_attention_against_loops():
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    q, k, v, bias = rand(2, 4, 5, 6), rand(2, 2, 7, 6), rand(2, 2, 7, 3), rand(1, 4, 5, 7)
    slopes, sinks = rand(2, 4).abs(), rand(4)
    out, lse = fastattn.attention(
        q,
        k,
        v,
        causal=True,
        window=(3, None),
        scale=0.7,
        softcap=1.5,
        alibi_slopes=slopes,
        bias=bias,
        sinks=sinks,
        return_lse=True,
        backend="reference",
    )
    mask = [[i + 2 - 3 <= j <= i + 2 for j in range(7)] for i in range(5)]
    for b in range(2):
        for h in range(4):
            one = [x.tolist() for x in (q[b, h], k[b, h // 2], v[b, h // 2])]
            expected = loops(
                *one, mask, 0.7, 1.5, slopes[b, h].item(), 2, bias[0, h].tolist(), sinks[h].item()
            )
            torch.testing.assert_close(out[b, h], torch.tensor(expected[0], dtype=torch.float64))
            torch.testing.assert_close(lse[b, h], torch.tensor(expected[1], dtype=torch.float64))


def test_backward_is_the_derivative_of_the_forward():
    """The spelled-out backward against autograd through the forward, every variant at once."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()

    q, k, v = leaf(2, 4, 5, 6), leaf(2, 2, 7, 6), leaf(2, 2, 7, 3)
    bias, sinks = leaf(4, 1, 7), leaf(4)
    keywords = {
        "causal": True,
        "window": (3, None),
        "softcap": 1.5,
        "alibi_slopes": torch.rand(4, dtype=torch.float64, generator=g),
        "dropout_p": 0.3,
        "return_lse": True,
    }
    leaves = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    grads = (leaf(2, 4, 5, 3).detach(), leaf(2, 4, 5).detach())
    results = [
        testing.run(lambda **x: f(**x, **keywords), leaves, grads, ("out", "lse"))  # noqa: B023
        for f in (lambda **x: fastattn.attention(**x, backend="reference"), testing.naive_attention)
    ]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], msg=name)


# ------------------------------------------------------------------------------------- edge cases


def attention(q, k, v, **keywords):
    """(out, lse, dq, dk, dv) by the reference, from a gradient of ones for out and lse."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend="reference", **keywords)
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    return out.detach(), lse.detach(), *grads


def qkv(q_len=4, k_len=4, dim=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, n, dim, generator=g) for n in (q_len, k_len, k_len)]


BLIND = {  # each hides every key from query 0
    "causal": {"causal": True},
    "mask": {"bias": torch.tensor([[False] * 4] + [[True] * 4] * 5)},
    "bias": {"bias": torch.tensor([[-INF] * 4] + [[0.0] * 4] * 5)},
    "window": {"window": (0, 0)},
}


@pytest.mark.parametrize("keywords", BLIND.values(), ids=BLIND)
def test_row_that_sees_no_key(keywords):
    q, k, v = qkv(q_len=6)
    out, lse, dq, dk, dv = attention(q, k, v, **keywords)
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -INF).all()
    assert (dq[:, :, 0] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("keywords", BLIND.values(), ids=BLIND)
def test_row_that_sees_only_a_sink(keywords):
    sinks = torch.tensor([0.5, -2.0])
    out, lse, *grads = attention(*qkv(q_len=6), sinks=sinks, **keywords)
    assert (out[:, :, 0] == 0).all()
    assert torch.equal(lse[:, :, 0], sinks[None])
    assert all(x.isfinite().all() for x in grads)


def test_smallest_bias_everywhere_is_a_mean():
    q, k, v = qkv()
    out, _, _, _, dv = attention(q, k, v, bias=torch.full((4, 4), torch.finfo(torch.float32).min))
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(dv, torch.ones_like(dv))


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 2.0])])
def test_no_keys(sinks):
    q, k, v = qkv(k_len=0)
    out, lse, dq, dk, dv = attention(q, k, v, sinks=sinks)
    assert (out == 0).all() and out.shape == q.shape
    assert torch.equal(
        lse, (torch.tensor([-INF] * 2) if sinks is None else sinks)[None, :, None].expand_as(lse)
    )
    assert (dq == 0).all() and dk.shape == k.shape and dv.shape == v.shape


def test_no_queries_and_no_batch():
    q, k, v = qkv(q_len=0)
    out, lse, _, dk, dv = attention(q, k, v)
    assert out.shape == q.shape and lse.shape == (1, 2, 0)
    assert (dk == 0).all() and (dv == 0).all()
    out, *grads = attention(*(x[:0] for x in qkv()))
    assert out.shape == (0, 2, 4, 8) and all(x.shape == out.shape for x in grads[1:])


def test_nan_reaches_the_rows_that_see_it_and_no_other():
    for name, touched in (("q", [2]), ("k", [2, 3]), ("v", [2, 3])):
        inputs = dict(zip("qkv", qkv(), strict=True))
        inputs[name][:, :, 2] = torch.nan
        out, _, dq, dk, dv = attention(**inputs, causal=True)
        assert out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == touched, name
        assert not dq[:, :, :2].isnan().any(), name
        if name == "q":  # key 3 is not seen by query 2
            assert not dk[:, :, 3].isnan().any() and not dv[:, :, 3].isnan().any()


def test_infinite_value_behind_the_mask():
    q, k, v = qkv()
    v[:, :, 3] = INF
    out, _, dq, *_ = attention(q, k, v, causal=True)
    assert out[:, :, :3].isfinite().all() and dq[:, :, :3].isfinite().all()
    assert (out[:, :, 3] == INF).all()


def test_infinite_logit_is_nan():
    q, k, v = qkv()
    bias = torch.zeros(4, 4)
    bias[1, 2] = INF
    out, *_ = attention(q, k, v, bias=bias)
    assert out[:, :, 1].isnan().all() and out[:, :, [0, 2, 3]].isfinite().all()


def test_huge_logits_are_finite():
    q, k, v = qkv()
    for x in attention(q * 1e9, k * 1e9, v):
        assert x.isfinite().all()
    q, k, v = (torch.full((1, 2, 4, 64), 256.0, dtype=torch.float16) for _ in range(3))
    out, *_ = attention(q, k, v)
    assert (out == 256).all()


def test_softcap_comes_before_the_mask():
    q, k, v = qkv()
    bias = torch.tensor([True, True, False, True])
    out, *_ = attention(q * 100, k, v, softcap=2.0, bias=bias)
    v[:, :, 2] = 1e6
    assert torch.equal(out, attention(q * 100, k, v, softcap=2.0, bias=bias)[0])


def test_dropping_everything():
    out, lse, dq, dk, dv = attention(*qkv(), dropout_p=1.0)
    assert (out == 0).all() and lse.isfinite().all() and (dv == 0).all()
    assert dq.isfinite().all() and dk.isfinite().all()
