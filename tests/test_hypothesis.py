"""Shapes, strides, dtypes and variants that nobody chose, under the error law."""

import math

import hypothesis.strategies as st
import pytest
import torch
from here import KERNELS
from hypothesis import given, settings

from fastattn import testing

EXAMPLES = 150
pytestmark = pytest.mark.skipif(not KERNELS, reason="nothing but the reference runs here")
backends = st.sampled_from(KERNELS or ["reference"])
# Not float64, which leaves nothing more exact to hold it against: what PyTorch computes in it is as
# far from the truth as we are. The case table and gradcheck have it.
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
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
    layouts_of = {name: draw(layouts(4)) for name in "qkv"}
    magnitude = draw(st.sampled_from([1, 4]))
    options = {
        "causal": draw(st.sampled_from([False, True, "top_left"])),
        "window": draw(
            st.none() | st.tuples(st.none() | st.integers(0, 90), st.none() | st.integers(0, 90))
        ),
        "scale": draw(st.sampled_from([None, None, 0.5, -0.2, 0.0])),
        "softcap": draw(st.sampled_from([None, None, 1.5, 20.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.6])),
        "backend": draw(backends),
    }
    slopes_shape = draw(st.sampled_from([None, (heads,), (batch, heads)]))
    sinks = draw(st.booleans())
    bias_shape = None
    if draw(st.booleans()):
        full = (batch, heads, q_len, k_len)
        bias_shape = [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, 3)) :]
        bias_dtype = draw(st.sampled_from([dtype, torch.float32]))
        bias_kind = draw(st.sampled_from(["bool", "-inf", "plain"]))
        bias_layout = draw(layouts(len(bias_shape)))

    def call(n):  # the n-th draw of the numbers
        at = seed + 1000 * n
        q = leaf((batch, heads, q_len, dim), dtype, at, layouts_of["q"], magnitude)
        k = leaf((batch, kv_heads, k_len, dim), dtype, at + 1, layouts_of["k"])
        v = leaf((batch, kv_heads, k_len, v_dim), dtype, at + 2, layouts_of["v"])
        arguments = {"q": q, "k": k, "v": v, "seed": at, **options}
        if slopes_shape:
            arguments["alibi_slopes"] = values(slopes_shape, torch.float32, at).abs()
        if sinks:
            arguments["sinks"] = values((heads,), dtype, at).requires_grad_()
        if bias_shape is not None:
            bias = values(bias_shape, bias_dtype, at)
            if bias_kind == "bool":
                arguments["bias"] = bias > -0.7
            else:
                if bias_kind == "-inf":
                    bias = bias.masked_fill(bias < -0.7, -math.inf)
                arguments["bias"] = lay_out(bias, bias_layout).detach().requires_grad_()
        return arguments

    return call


@settings(max_examples=EXAMPLES)
@given(attention_calls())
def test_attention(call):
    with testing.poisoned_empty():
        testing.over_draws(lambda n: testing.compare_attention(**call(n)))


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
    mean, layout = draw(st.sampled_from([0, 10])), draw(layouts(len(shape)))
    has_weight, has_bias, rms = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    residual_layout = draw(st.none() | layouts(len(shape)))
    backend, dropout_p = draw(backends), draw(st.sampled_from([0.0, 0.3]))

    def compare(n):  # the n-th draw of the numbers
        at = seed + 1000 * n
        x = lay_out(values(shape, dtype, at) + mean, layout).detach().requires_grad_()
        keywords = {}
        if has_weight:
            keywords["weight"] = values(normalized, parameters, at + 1).requires_grad_()
        if has_bias and not rms:
            keywords["bias"] = values(normalized, parameters, at + 2).requires_grad_()
        if residual_layout is not None:
            keywords["residual"] = leaf(shape, dtype, at + 3, residual_layout)
            keywords["dropout_p"] = dropout_p
        return testing.compare_layer_norm(backend, x, normalized, rms=rms, seed=at, **keywords)

    with testing.poisoned_empty():
        testing.over_draws(compare)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_softmax(data):
    draw = data.draw
    shape, dtype, seed = draw(rows()), draw(dtypes), draw(seeds)
    layout, magnitude = draw(layouts(len(shape))), draw(st.sampled_from([1, 20]))
    mask_shape = None
    if draw(st.booleans()):
        mask_shape = [n if draw(st.booleans()) else 1 for n in shape]
        mask_shape = mask_shape[draw(st.integers(0, len(shape) - 1)) :]
        mask_layout, boolean = draw(layouts(len(mask_shape))), draw(st.booleans())
    backend, dim = draw(backends), draw(st.integers(-len(shape), len(shape) - 1))
    options = {"log": draw(st.booleans()), "scale": draw(st.sampled_from([1.0, 0.3, -2.0]))}

    def compare(n):  # the n-th draw of the numbers
        at = seed + 1000 * n
        x = leaf(shape, dtype, at, layout, magnitude)
        mask = None
        if mask_shape is not None:
            mask = lay_out(values(mask_shape, dtype, at + 1), mask_layout)
            mask = mask > -0.7 if boolean else mask
        return testing.compare_softmax(backend, x, dim, mask=mask, seed=at, **options)

    with testing.poisoned_empty():
        testing.over_draws(compare)
