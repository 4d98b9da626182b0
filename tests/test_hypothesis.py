"""Shapes, strides, dtypes and variants that nobody chose, under the error law."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fastattn
from fastattn import testing
from fastattn.cases import DTYPES

EXAMPLES = 150
BACKENDS = [name for name in fastattn.backends().available if name != "reference"]
pytestmark = pytest.mark.skipif(not BACKENDS, reason="nothing but the reference runs here")
backends = st.sampled_from(BACKENDS or ["reference"])
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)


def values(shape, dtype, seed, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (magnitude * torch.randn(shape, generator=generator)).to(dtype)


@st.composite
def layouts(draw, rank):
    """How a tensor lies in memory: the order of its dimensions, which is strided by how much, which
    is broadcast, and by how many elements its first one is off."""
    return (
        draw(st.permutations(range(rank))),
        draw(st.integers(0, rank - 1)),
        draw(st.sampled_from([1, 1, 1, 2, 3])),
        draw(st.sampled_from([None, None, None, *range(rank)])),
        draw(st.integers(0, 5)),
    )


def lay_out(x, layout):
    order, strided, step, broadcast, offset = layout
    if broadcast is not None and x.shape[broadcast] > 0:
        return lay_out(x.narrow(broadcast, 0, 1), (order, strided, step, None, offset)).expand(
            x.shape
        )
    sizes = [x.shape[d] * (step if d == strided else 1) for d in order]
    memory = torch.full((math.prod(sizes) + offset,), torch.nan, dtype=x.dtype)
    inverse = [order.index(d) for d in range(x.dim())]
    wide = memory[offset:].view(sizes).permute(inverse)
    slices = [slice(None, None, step if d == strided else 1) for d in range(x.dim())]
    return wide[tuple(slices)].copy_(x)


def leaf(shape, dtype, seed, layout, magnitude=1.0):
    return lay_out(values(shape, dtype, seed, magnitude), layout).detach().requires_grad_()


@st.composite
def attention_calls(draw):
    dtype, seed = draw(dtypes), draw(seeds)
    batch, kv_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    q_len, k_len = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    dim, v_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    heads = kv_heads * group
    if draw(st.booleans()):
        q_len = draw(st.integers(1, 3))
    layout = layouts(4)
    call = {
        "q": leaf(
            (batch, heads, q_len, dim), dtype, seed, draw(layout), draw(st.sampled_from([1, 4]))
        ),
        "k": leaf((batch, kv_heads, k_len, dim), dtype, seed + 1, draw(layout)),
        "v": leaf((batch, kv_heads, k_len, v_dim), dtype, seed + 2, draw(layout)),
        "causal": draw(st.sampled_from([False, True, "top_left"])),
        "window": draw(
            st.none() | st.tuples(st.none() | st.integers(0, 90), st.none() | st.integers(0, 90))
        ),
        "scale": draw(st.sampled_from([None, None, 0.5, -0.2, 0.0])),
        "softcap": draw(st.sampled_from([None, None, 1.5, 20.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.6])),
        "backend": draw(backends),
        "seed": seed,
    }
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        call["alibi_slopes"] = values(shape, torch.float32, seed).abs()
    if draw(st.booleans()):
        call["sinks"] = values((heads,), dtype, seed).requires_grad_()
    if draw(st.booleans()):
        full = (batch, heads, q_len, k_len)
        shape = [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, 3)) :]
        bias = values(shape, draw(st.sampled_from([dtype, torch.float32])), seed)
        kind = draw(st.sampled_from(["bool", "-inf", "plain"]))
        if kind == "bool":
            call["bias"] = bias > -0.7
        else:
            if kind == "-inf":
                bias = bias.masked_fill(bias < -0.7, -math.inf)
            call["bias"] = lay_out(bias, draw(layouts(bias.dim()))).detach().requires_grad_()
    return call


@settings(max_examples=EXAMPLES)
@given(attention_calls())
def test_attention(call):
    backend = call.pop("backend")
    with testing.poisoned_empty():
        testing.check_attention(backend, **call)


@st.composite
def rows(draw, most=2000):
    rank = draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 6)) for _ in range(rank)]
    wide = draw(st.integers(0, rank - 1))
    shape[wide] = draw(st.integers(1, most))
    return tuple(shape)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_layer_norm(data):
    draw = data.draw
    shape, dtype, seed = draw(rows()), draw(dtypes), draw(seeds)
    normalized = shape[draw(st.integers(0, len(shape) - 1)) :]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    parameters = draw(st.sampled_from([dtype, wide]))
    x = lay_out(
        values(shape, dtype, seed) + draw(st.sampled_from([0, 10])), draw(layouts(len(shape)))
    )
    keywords = {}
    if draw(st.booleans()):
        keywords["weight"] = values(normalized, parameters, seed + 1).requires_grad_()
    rms = draw(st.booleans())
    if draw(st.booleans()) and not rms:
        keywords["bias"] = values(normalized, parameters, seed + 2).requires_grad_()
    if draw(st.booleans()):
        keywords["residual"] = leaf(shape, dtype, seed + 3, draw(layouts(len(shape))))
        keywords["dropout_p"] = draw(st.sampled_from([0.0, 0.3]))
    with testing.poisoned_empty():
        testing.check_layer_norm(
            draw(backends), x.detach().requires_grad_(), normalized, rms=rms, seed=seed, **keywords
        )


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_softmax(data):
    draw = data.draw
    shape, dtype, seed = draw(rows()), draw(dtypes), draw(seeds)
    x = leaf(shape, dtype, seed, draw(layouts(len(shape))), draw(st.sampled_from([1, 20])))
    keywords = {}
    if draw(st.booleans()):
        mask_shape = [n if draw(st.booleans()) else 1 for n in shape]
        mask = values(mask_shape[draw(st.integers(0, len(shape) - 1)) :], dtype, seed + 1)
        mask = lay_out(mask, draw(layouts(mask.dim())))
        keywords["mask"] = mask > -0.7 if draw(st.booleans()) else mask
    with testing.poisoned_empty():
        testing.check_softmax(
            draw(backends),
            x,
            draw(st.integers(-len(shape), len(shape) - 1)),
            log=draw(st.booleans()),
            scale=draw(st.sampled_from([1.0, 0.3, -2.0])),
            seed=seed,
            **keywords,
        )
