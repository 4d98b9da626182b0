"""Derivatives against finite differences in float64, by every backend: attention on several blocks
of queries and keys, softmax with masks. The plain ones are with each op, in test_ops_*.py."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn


def leaves(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


ATTENTION = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (20, 3)},
    "softcap": {"softcap": 2.0, "scale": -0.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0])},
    "dropout": {"dropout_p": 0.4},
    "all": {
        "causal": True,
        "window": (25, None),
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0]),
        "dropout_p": 0.3,
    },
}


@pytest.mark.parametrize("bias", [(4, 1, 59), (33, 59), (1, 4, 33, 59), None], ids=str)
@pytest.mark.parametrize("keywords", ATTENTION.values(), ids=ATTENTION)
def test_attention(keywords, bias, backend):
    def function(q, k, v, sinks, *bias):
        torch.manual_seed(0)
        return fastattn.attention(
            q,
            k,
            v,
            sinks=sinks,
            bias=bias[0] if bias else None,
            return_lse=True,
            backend=backend,
            **keywords,
        )

    shapes = [(1, 4, 33, 3), (1, 2, 59, 3), (1, 2, 59, 5), (4,)]
    inputs = leaves(*shapes, *([bias] if bias else []))
    assert gradcheck(function, inputs, fast_mode=True)


SOFTMAX_MASKS = {
    "none": None,
    "boolean": torch.tensor([[True, False, True, True, False]] * 3 + [[False] * 5]),
    "row": torch.tensor([0.0, -torch.inf, 1.0, 2.0, -1.0], dtype=torch.float64),
}


@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax])
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("mask", SOFTMAX_MASKS.values(), ids=SOFTMAX_MASKS)
def test_softmax(function, dim, mask, backend):
    (x,) = leaves((2, 4, 5))

    def finite(x):
        y = function(x, dim, scale=0.7, mask=mask, backend=backend)
        return y.masked_fill(y == -torch.inf, 0.0)  # no finite difference of -inf

    assert gradcheck(finite, x)
    assert gradgradcheck(finite, x, fast_mode=True)


def test_learned_mask_of_a_softmax(backend):
    x, mask = leaves((3, 5), (5,))
    function = lambda x, mask: fastattn.softmax(x, scale=0.7, mask=mask, backend=backend)
    assert gradcheck(function, (x, mask))
