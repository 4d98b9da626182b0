"""The attention forward of sm_90a in the emulator, against the definition: what it serves, and the
ways in which a call leaves it for the kernels of sm_80."""

import math

import pytest
import torch

import fastattn
from fastattn import dispatch, proof, testing
from fastattn.cases import AttentionCase

BACKEND = dispatch.BACKENDS["cuda"]
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def hopper():
    BACKEND.module.emulate(90)
    BACKEND.module.take_launches()
    yield
    BACKEND.module.emulate(80)


def launched():
    """Whether the last attention forward was sm_90a's."""
    names = BACKEND.module.take_launches()
    return any("sm_90a" in name for name in names)


def prove(dtype=torch.bfloat16, expect=True, **fields):
    fields = {"batch": 1, "heads": 2, "kv_heads": 1} | fields
    case = AttentionCase("sm90", **fields)
    with testing.poisoned_empty():
        verdict = proof.prove(case.with_dtype(dtype), "cuda")
    assert verdict.passed and not verdict.refusal, verdict
    assert launched() == expect


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("lengths", [(64, 64), (130, 200), (200, 130), (257, 400)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_shapes(head_dim, lengths, causal, dtype):
    q_len, k_len = lengths
    prove(dtype, head_dim=head_dim, q_len=q_len, k_len=k_len, causal=causal)


@pytest.mark.parametrize("head_dim", [40, 56, 104, 120, 200])
def test_head_dims_between(head_dim):
    prove(head_dim=head_dim, q_len=150, k_len=170, causal=True)


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
    prove(expect=False, **{"q_len": 100, "k_len": 130, "head_dim": 64} | fields)


def test_expanded_keys_have_no_tensor_map():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 80, 64, generator=g).bfloat16()
    k, v = (torch.randn(1, 1, 90, 64, generator=g).bfloat16().expand(1, 4, 90, 64) for _ in "kv")
    out = fastattn.attention(q, k, v, backend="cuda")
    want = fastattn.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=0.02, atol=8e-3)
    assert not launched()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", "qkv")
def test_a_nan_stays_where_it_is_seen(name, value):
    g = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(1, 2, 300, 64, generator=g).bfloat16() for n in "qkv"}
    clean = fastattn.attention(**inputs, causal=True, return_lse=True, backend="cuda")
    dirty = {n: x.clone() for n, x in inputs.items()}
    dirty[name][:, :, 150, 3] = value
    touched = torch.arange(300) == 150 if name == "q" else torch.arange(300) >= 150
    got = fastattn.attention(**dirty, causal=True, return_lse=True, backend="cuda")
    if value != value:
        assert torch.equal(got[0][0, 0].isnan().any(-1), touched)
    for mine, same in zip(got, clean, strict=True):
        torch.testing.assert_close(mine[:, :, ~touched], same[:, :, ~touched], rtol=0.02, atol=8e-3)
    assert launched()


@pytest.mark.parametrize("size", [1e3, 1e9, 1e15])
def test_logits_out_of_reach(size):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 100, 64, generator=g).bfloat16() for _ in "qkv")
    out, lse = fastattn.attention(q * size, k * size, v, return_lse=True, backend="cuda")
    scores = (q * size).double() @ (k * size).double().mT
    weights = torch.softmax(scores * 0.125, -1)
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=0.02, atol=0.02)
    assert lse.isfinite().all() and launched()


def test_nothing_is_found_broken():
    """A kernel that repairs its own results would hide a mistake."""
    BACKEND.module.take_rare()
    prove(q_len=300, k_len=300, head_dim=64, causal=True)
    assert BACKEND.module.take_rare() == []
