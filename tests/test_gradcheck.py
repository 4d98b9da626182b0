"""Derivatives against finite differences in float64, first and second, by every backend.

Attention on a few queries is in test_ops_attention.py; here are shapes of several blocks.
"""

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


LAYER_NORM_SHAPES = pytest.mark.parametrize(
    ("shape", "dims"), [((3, 5), 1), ((2, 3, 17), 1), ((2, 3, 2, 4), 2), ((33,), 1)], ids=str
)


@LAYER_NORM_SHAPES
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_layer_norm(shape, dims, affine, backend):
    normalized = shape[-dims:]
    x, weight, bias = leaves(shape, normalized, normalized)

    def function(x, weight, bias):
        kept = (weight if affine in ("both", "weight") else None,)
        kept += (bias if affine in ("both", "bias") else None,)
        return fastattn.layer_norm(x, normalized, *kept, backend=backend)

    used = {"both": (x, weight, bias), "weight": (x, weight), "bias": (x, bias), "none": (x,)}
    for leaf in (x, weight, bias):
        leaf.requires_grad_(any(leaf is one for one in used[affine]))
    assert gradcheck(function, (x, weight, bias))
    assert gradgradcheck(function, (x, weight, bias), fast_mode=True)


@LAYER_NORM_SHAPES
def test_rms_norm(shape, dims, backend):
    function = lambda x, w: fastattn.rms_norm(x, shape[-dims:], w, 1e-5, backend=backend)
    inputs = leaves(shape, shape[-dims:])
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@LAYER_NORM_SHAPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("rms", [False, True])
def test_fused_residual(shape, dims, dropout_p, rms, backend):
    def function(x, residual, weight, bias):
        torch.manual_seed(0)
        keywords = {"dropout_p": dropout_p, "backend": backend}
        if rms:
            return fastattn.add_rms_norm(x, residual, shape[-dims:], weight, 1e-5, **keywords)
        return fastattn.add_layer_norm(x, residual, shape[-dims:], weight, bias, **keywords)

    inputs = leaves(shape, shape, shape[-dims:], shape[-dims:])
    inputs[3].requires_grad_(not rms)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


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
