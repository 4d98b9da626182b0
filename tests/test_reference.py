"""The oracle itself, against the definition in plain loops; its edge cases: test_edge_cases.py."""

import math

import pytest
import torch

import fastattn
from fastattn import reference, testing


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
