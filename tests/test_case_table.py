"""The one case table, by every backend that runs here, under the error law.

What torch.empty returns is filled with NaN meanwhile: a number that a kernel leaves out shows.
"""

import dataclasses
import itertools

import pytest
import torch

from fastattn import proof, testing
from fastattn.cases import CASES, DTYPES, AttentionCase

TABLE = [case.with_dtype(dtype) for case in CASES for dtype in DTYPES]

# Each variant, to be combined with each other.
VARIANTS = {
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (20, 9)},
    "softcap": {"softcap": 3.0, "magnitude": 3.0},
    "alibi": {"alibi": "batch_heads"},
    "bias": {"bias": "additive", "bias_shape": "1hqk"},
    "bias_keys": {"bias": "-inf", "bias_shape": "b11k"},
    "mask": {"bias": "boolean"},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.25},
    "gqa": {"kv_heads": 2},
    "value_dim": {"value_dim": 33},
    "column": {"layout": "column"},
}
PAIRS = [
    (a, b)
    for a, b in itertools.combinations(VARIANTS, 2)
    if not VARIANTS[a].keys() & VARIANTS[b].keys()
]
FORMS = {
    "tiles": {"q_len": 45, "k_len": 71, "head_dim": 20, "heads": 8, "batch": 1},
    "long_queries": {"q_len": 71, "k_len": 45, "head_dim": 20, "heads": 8, "batch": 1},
    # Few enough numbers for testing.over_draws: all depend on the largest scores of few rows.
    "decode": {"q_len": 2, "k_len": 151, "head_dim": 16, "heads": 4, "batch": 2},
}


def prove(case, backend):
    with testing.poisoned_empty():
        verdict = proof.prove(case, backend)
    assert not verdict.refusal, verdict.refusal  # what runs here serves everything
    assert verdict.passed, verdict.problem


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_case(case, backend):
    prove(case, backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_of_variants(pair, form, backend):
    fields = FORMS[form] | VARIANTS[pair[0]] | VARIANTS[pair[1]]
    case = AttentionCase("+".join(pair), **fields)
    prove(case, backend)
    if form == "tiles":
        prove(case.with_dtype(torch.bfloat16), backend)


# Around the sizes of the kernels' blocks, where a loop's last step is short or missing.
@pytest.mark.parametrize(
    "head_dim", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257]
)
def test_head_dims(head_dim, backend):
    case = AttentionCase("head_dim", q_len=21, k_len=34, head_dim=head_dim, causal=True, batch=1)
    for dtype in DTYPES:
        prove(case.with_dtype(dtype), backend)
    prove(dataclasses.replace(case, q_len=1), backend)
    prove(dataclasses.replace(case, head_dim=24, value_dim=head_dim), backend)


LENGTHS = [1, 2, 3, 5, 6, 8, 9, 15, 17, 23, 25, 31, 33, 47, 49, 63, 65, 95, 97, 127, 129, 191, 193]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths(length, dtype, backend):
    fields = {"head_dim": 8, "batch": 1, "dtype": dtype}
    prove(AttentionCase("keys", q_len=13, k_len=length, **fields), backend)
    prove(AttentionCase("queries", q_len=length, k_len=40, causal=True, **fields), backend)
    prove(AttentionCase("square", q_len=length, window=(30, 7), **fields), backend)
    prove(AttentionCase("decode", q_len=1, k_len=length, **fields), backend)


@pytest.mark.parametrize("heads", [1, 3, 8, 16, 64, 65, 80])
def test_decode_of_a_group_of_heads(heads, backend):
    """One KV head for 1 to 80 query heads: beyond 64 rows decode is not decode any more."""
    case = AttentionCase("group", batch=1, heads=heads, kv_heads=1, q_len=1, k_len=300, head_dim=32)
    prove(case, backend)
    prove(dataclasses.replace(case, q_len=2, causal=True, dtype=torch.bfloat16), backend)


# ------------------------------------------------------------------------------- output gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [3, 40])
def test_strides_of_the_output_gradient(q_len, dtype, backend):
    """An expanded dout, as sum() makes it, a transposed and a sliced one."""
    import fastattn

    q, k, v = AttentionCase("dout", q_len=q_len, k_len=50, dtype=dtype).make_inputs().values()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = fastattn.attention(*inputs, causal=True, return_lse=True, backend=backend)
    b, h, s, d = out.shape
    wide = torch.randn(b, s, d, 2 * h, dtype=dtype)
    for dout in (
        torch.ones(1, 1, 1, 1, dtype=dtype).expand(out.shape),
        torch.randn(b, h, 1, 1, dtype=dtype).expand(out.shape),
        wide[..., ::2].permute(0, 3, 1, 2),
        torch.randn(b, h, s, 3 * d, dtype=dtype)[..., d : 2 * d],
    ):
        dlse = torch.randn(b, s, h).transpose(1, 2)
        got = torch.autograd.grad((out, lse), inputs, (dout, dlse), retain_graph=True)
        plain = (dout.contiguous(), dlse.contiguous())
        same = torch.autograd.grad((out, lse), inputs, plain, retain_graph=True)
        for mine, theirs in zip(got, same, strict=True):
            torch.testing.assert_close(mine, theirs)
