"""The public functions on samples of the kind that torch tests its own operators with (its OpInfo):
every rank, every way to leave an argument out, broadcasting, one element, none.

Values and gradients are held to torch's operator of the same name. Then what holds of any operator:
gaps in memory make no difference, inputs stay as they were, and so do results without autograd.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import testing
from fastattn.cases import DTYPES

Shape = tuple[int, ...]


class Sample(NamedTuple):
    name: str  # of the function, here and in torch.nn.functional
    shapes: dict[str, Shape]  # of its tensors, in the order of its arguments
    keywords: dict[str, Any] = {}  # noqa: RUF012  # nobody changes it
    boolean: bool = False  # the mask

    def __str__(self):
        shapes = "-".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes.values())
        keywords = "-".join(f"{key}={value}" for key, value in self.keywords.items())
        return "-".join(filter(None, (self.name, shapes, keywords, "bool" * self.boolean)))

    def call(self, owner, **more):
        function = getattr(owner, self.name)
        return lambda **tensors: function(**tensors, **self.keywords, **more)

    def inputs(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        made = {n: torch.randn(s, generator=generator).to(dtype) for n, s in self.shapes.items()}
        if self.boolean:
            made["attn_mask"] = made["attn_mask"] > -0.7
        return {n: x.requires_grad_() if x.is_floating_point() else x for n, x in made.items()}


def attention_samples():
    b, h, m, n, d = 2, 2, 3, 6, 8

    def sample(q, kv, v=None, mask=None, boolean=False, **keywords):
        shapes = {"query": q, "key": kv, "value": v or kv}
        if mask is not None:
            shapes["attn_mask"] = mask
        return Sample("scaled_dot_product_attention", shapes, keywords, boolean)

    for lead in ((), (b,), (b, h), (2, 1, h)):
        q, kv = (*lead, m, d), (*lead, n, d)
        for causal in (False, True):
            yield sample(q, kv, is_causal=causal)
        yield sample(q, kv, (*lead, n, 5), scale=0.3)
        for mask in ((m, n), (1, n), (m, 1), (*lead, m, n)):
            if mask != (m, 1):  # the same for every key: its gradient is nothing but rounding
                yield sample(q, kv, mask=mask)
            yield sample(q, kv, mask=mask, boolean=True)
    yield sample((h, m, d), (b, h, n, d))  # what is missing in front is broadcast
    yield sample((b, h, m, d), (1, h, n, d), is_causal=True)
    yield sample((b, h, m, d), (h, n, d), mask=(h, 1, n))
    yield sample((b, 4, m, d), (b, 2, n, d), enable_gqa=True)
    yield sample((b, 4, m, d), (b, 1, n, d), (b, 1, n, 3), enable_gqa=True, is_causal=True)
    for sizes in ((1, n), (m, 1), (1, 1), (33, 65), (0, n)):
        yield sample((b, h, sizes[0], d), (b, h, sizes[1], d))
    yield sample((2, 1, 4, 1), (2, 1, 4, 1))
    yield sample((0, h, m, d), (0, h, n, d))


def norm_samples():
    for shape, normalized in (
        ((1, 2, 3), (1, 2, 3)),
        ((2, 2, 3), (2, 3)),
        ((5,), (5,)),
        ((1,), (1,)),
        ((1, 2), (2,)),
        ((0, 4), (4,)),
        ((2, 0, 4), (4,)),
        ((2, 3, 4, 5, 6), (5, 6)),
        ((7, 130), (130,)),
    ):
        keywords = {"normalized_shape": normalized}
        for eps in (None, 0.5):
            more = keywords if eps is None else keywords | {"eps": eps}
            for parameters in ((), ("weight",), ("bias",), ("weight", "bias")):
                shapes = {"input": shape} | dict.fromkeys(parameters, normalized)
                yield Sample("layer_norm", shapes, more)
                if "bias" not in parameters:
                    yield Sample("rms_norm", shapes, more)


def softmax_samples():
    for shape, dims in (
        ((), (0, -1)),
        ((5,), (0,)),
        ((5, 5), (0, 1, -1)),
        ((5, 4, 5), (0, 1, 2, -2)),
        ((2, 1, 3, 1, 4), (1, 2, 4)),
        ((1, 1), (0, 1)),
        ((5, 0), (0, 1)),
        ((0, 5, 0), (0, 1)),
        ((3, 1100), (0, 1)),
    ):
        for dim in dims:
            for name in ("softmax", "log_softmax"):
                yield Sample(name, {"input": shape}, {"dim": dim})
                yield Sample(name, {"input": shape}, {"dim": dim, "dtype": torch.float32})


SAMPLES = [*attention_samples(), *norm_samples(), *softmax_samples()]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@samples
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_torch(sample, dtype, backend):
    if "dtype" in sample.keywords:
        exactly = sample._replace(keywords=sample.keywords | {"dtype": torch.float64})
    else:
        exactly = sample
    if dtype is torch.float64:  # what would be cast to less is another sample
        sample = exactly

    def draw(seed):
        inputs = sample.inputs(dtype, seed)
        shape = sample.call(F)(**inputs).shape
        generator = torch.Generator().manual_seed(seed)
        dout = (torch.randn(shape, generator=generator, dtype=torch.float64),)
        mine = testing.run(sample.call(fastattn, backend=backend), inputs, dout, ("out",))
        torchs = testing.run(sample.call(F), inputs, dout, ("out",))
        wide = testing.cast(inputs, torch.float64)
        exact = testing.run(exactly.call(F), wide, dout, ("out",))
        for name, x in mine.items():
            assert x.dtype is torchs[name].dtype
        return testing.Comparison(mine, torchs, exact)

    with testing.poisoned_empty():
        if dtype is not torch.float64:
            testing.over_draws(draw)
            return
        mine, torchs, _ = draw(0)
        for name, x in mine.items():
            torch.testing.assert_close(x, torchs[name], rtol=1e-12, atol=1e-12)


@samples
def test_as_any_operator(sample, backend):
    call = sample.call(fastattn, backend=backend)
    inputs = sample.inputs(torch.float32)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    out = call(**inputs)
    with torch.no_grad():
        assert torch.equal(call(**inputs), out)
    gaps = {name: with_gaps(x) for name, x in inputs.items()}
    torch.testing.assert_close(call(**gaps), out)
    leaves = [x for x in inputs.values() if x.requires_grad]
    same = torch.autograd.grad(out.sum(), leaves)
    gapped = [x for x in gaps.values() if x.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(call(**gaps).sum(), gapped), same, strict=True):
        torch.testing.assert_close(mine, theirs)
    for name, x in inputs.items():
        assert torch.equal(x, before[name])


def with_gaps(x):
    """The same numbers, every other one in memory: between them what must not be read."""
    hole = torch.nan if x.is_floating_point() else True
    wide = torch.full((*x.shape, 2), hole, dtype=x.dtype)
    wide[..., 0] = x.detach()
    return wide[..., 0].requires_grad_(x.requires_grad)
