"""The attention of sm_90a in the emulator, both directions, against the definition: what it serves, and
the ways in which a call leaves it for the kernels of sm_80."""

import math

import pytest
import torch

import fastattn
from fastattn import dispatch, proof, testing
from fastattn.cases import AttentionCase

BACKEND = dispatch.BACKENDS["cuda"]
DTYPES = (torch.bfloat16, torch.float16)
FORWARD, BACKWARD = {"forward"}, {"dq", "dk and dv"}
BOTH = FORWARD | BACKWARD


@pytest.fixture(autouse=True)
def hopper():
    BACKEND.module.emulate(90)
    BACKEND.module.take_launches()
    yield
    BACKEND.module.emulate(80)


def launched():
    """The kernels of sm_90a that ran since this was last asked."""
    suffix = ", sm_90a"
    names = [x.removeprefix("attention_") for x in BACKEND.module.take_launches()]
    return {x.removesuffix(suffix).removeprefix("backward, ") for x in names if x.endswith(suffix)}


def prove(dtype=torch.bfloat16, expect=BOTH, **fields):
    fields = {"batch": 1, "heads": 2, "kv_heads": 1} | fields
    case = AttentionCase("sm90", **fields)
    with testing.poisoned_empty():
        verdict = proof.prove(case.with_dtype(dtype), "cuda")
    assert verdict.passed and not verdict.refusal, verdict
    assert launched() == expect


def numbers(heads, q_len, k_len, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    shapes = ((1, heads[0], q_len, 64), (1, heads[1], k_len, 64), (1, heads[1], k_len, 64))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def attention(q, k, v, wanted="qkv", **keywords):
    """out, lse and the gradients of what is wanted."""
    inputs = {n: x.detach() for n, x in zip("qkv", (q, k, v), strict=True)}
    leaves = [inputs[n].requires_grad_() for n in wanted]
    with testing.poisoned_empty():
        out, lse = fastattn.attention(*inputs.values(), return_lse=True, backend="cuda", **keywords)
        ones = (torch.ones_like(out), torch.ones_like(lse))
        return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, ones)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("lengths", [(64, 64), (130, 200), (200, 130), (257, 400)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_shapes(head_dim, lengths, causal, dtype):
    q_len, k_len = lengths
    expect = FORWARD if head_dim == 256 else BOTH
    prove(dtype, expect, head_dim=head_dim, q_len=q_len, k_len=k_len, causal=causal)


@pytest.mark.parametrize("head_dim", [40, 56, 104, 120, 200])
def test_head_dims_between(head_dim):
    expect = FORWARD if head_dim > 128 else BOTH
    prove(expect=expect, head_dim=head_dim, q_len=150, k_len=170, causal=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"heads": 6, "kv_heads": 2, "batch": 3},
        {"window": (70, 20)},
        {"window": (300, 0)},
        {"sinks": True, "causal": True},
        {"value_dim": 64, "head_dim": 128},
        {"value_dim": 128, "head_dim": 72},
        {"layout": "bshd"},
    ],
    ids=str,
)
def test_variants(fields):
    prove(**{"q_len": 210, "k_len": 330, "head_dim": 64} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 96},
        {"head_dim": 63},
        {"q_len": 40},
        {"layout": "column"},
        {"softcap": 3.0},
        {"alibi": "heads"},
        {"dropout_p": 0.25},
        {"bias": "additive", "bias_shape": "1hqk"},
    ],
    ids=str,
)
def test_what_sm80_serves(fields):
    prove(expect=set(), **{"q_len": 100, "k_len": 130, "head_dim": 64} | fields)


def test_few_keys_have_the_backward_of_sm80():
    prove(expect=FORWARD, q_len=100, k_len=40, head_dim=64)


def test_an_expanded_gradient_has_no_tensor_map():
    q, k, v = (x.requires_grad_() for x in numbers((2, 1), 80, 90))
    fastattn.attention(q, k, v, backend="cuda").sum().backward()
    assert launched() == FORWARD and all(x.grad.isfinite().all() for x in (q, k, v))


def test_expanded_keys_have_no_tensor_map():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 80, 64, generator=g).bfloat16()
    k, v = (torch.randn(1, 1, 90, 64, generator=g).bfloat16().expand(1, 4, 90, 64) for _ in "kv")
    out = fastattn.attention(q, k, v, backend="cuda")
    want = fastattn.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=0.02, atol=8e-3)
    assert not launched()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_only_the_gradients_that_are_wanted(wanted):
    q, k, v = numbers((4, 2), 130, 150)
    every = dict(zip("qkv", attention(q, k, v, causal=True)[2:], strict=True))
    launched()
    some = attention(q, k, v, wanted, causal=True)[2:]
    assert all(torch.equal(x, every[n]) for n, x in zip(wanted, some, strict=True))
    parts = {"dq" if n == "q" else "dk and dv" for n in wanted}
    assert launched() == FORWARD | parts


def test_repeats_to_the_bit():
    q, k, v = numbers((4, 2), 200, 300)
    first, second = (attention(q, k, v, window=(150, 20)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert launched() == BOTH


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", "qkv")
def test_a_nan_stays_where_it_is_seen(name, value):
    inputs = dict(zip("qkv", numbers((1, 1), 200, 200), strict=True))
    clean = attention(**inputs, causal=True)
    dirty = {n: x.clone() for n, x in inputs.items()}
    dirty[name][:, :, 150, 3] = value
    touched = torch.arange(200) == 150 if name == "q" else torch.arange(200) >= 150
    got = attention(**dirty, causal=True)
    if value != value:
        assert torch.equal(got[0][0, 0].isnan().any(-1), touched)
    for mine, same in zip(got[:3], clean[:3], strict=True):
        torch.testing.assert_close(mine[:, :, ~touched], same[:, :, ~touched], rtol=0.02, atol=8e-3)
    if name == "q":  # the keys that the query does not see
        for mine, same in zip(got[3:], clean[3:], strict=True):
            torch.testing.assert_close(mine[:, :, 151:], same[:, :, 151:], rtol=0.02, atol=8e-3)
    assert launched() == BOTH


@pytest.mark.parametrize("size", [1e3, 1e9, 1e15])
def test_logits_out_of_reach(size):
    q, k, v = numbers((1, 1), 100, 100)
    out, lse, *gradients = attention(q * size, k * size, v)
    scores = (q * size).double() @ (k * size).double().mT
    weights = torch.softmax(scores * 0.125, -1)
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=0.02, atol=0.02)
    assert all(x.isfinite().all() for x in (lse, *gradients)) and launched() == BOTH


def test_nothing_is_found_broken():
    """A kernel that repairs its own results would hide a mistake."""
    BACKEND.module.take_rare()
    prove(q_len=300, k_len=300, head_dim=64, causal=True)
    assert BACKEND.module.take_rare() == []
