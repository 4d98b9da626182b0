"""The case table itself: its names, its inputs and its arithmetic."""

import pytest
import torch

from fastattn.bench import table
from fastattn.cases import CASES, DTYPES, LAYOUTS, AttentionCase, LayerNormCase, SoftmaxCase
from fastattn.spec import AttentionSpec


def test_names_are_unique():
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    ids = [benchmark.id for benchmark in table.BENCHMARKS]
    assert len(set(ids)) == len(ids)


def test_every_layout_is_in_the_table():
    for kind in (AttentionCase, LayerNormCase):
        used = {case.layout for case in CASES if isinstance(case, kind)}
        assert used == set(LAYOUTS)


def test_every_variant_is_in_the_table():
    cases = [case for case in CASES if isinstance(case, AttentionCase)]
    assert {case.causal for case in cases} >= {False, True, "bottom_right", "top_left"}
    assert {case.bias for case in cases} == {None, "additive", "boolean", "-inf"}
    assert {case.alibi for case in cases} == {None, "heads", "batch_heads"}
    assert {1, 3, 59, 512} <= {case.head_dim for case in cases}
    for name in ("window", "softcap", "sinks", "dropout_p", "value_dim", "kv_heads"):
        assert any(getattr(case, name) for case in cases), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values_in_other_strides(layout):
    shape = {"batch": 3, "heads": 2, "q_len": 5, "head_dim": 8}
    plain = AttentionCase("plain", **shape).make_inputs()["q"]
    q = AttentionCase("laid_out", layout=layout, **shape).make_inputs()["q"]
    expected = plain[:1].expand_as(plain) if layout == "expanded" else plain
    assert torch.equal(q, expected)
    as_plain = (q.stride(), q.storage_offset()) == (plain.stride(), 0)
    assert as_plain == (layout == "contiguous")


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_repeatable_and_differ_by_rounding_alone(dtype):
    case = AttentionCase("inputs", bias="additive", sinks=True)
    once = case.with_dtype(dtype).make_inputs(seed=3, requires_grad=True)
    again = case.with_dtype(dtype).make_inputs(seed=3)
    for name, x in case.make_inputs(seed=3).items():
        assert torch.equal(once[name], again[name])
        assert torch.equal(once[name], x.to(dtype))
        assert once[name].requires_grad == (name in case.differentiable)
    assert not torch.equal(case.make_inputs(seed=4)["q"], case.make_inputs(seed=3)["q"])


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c, AttentionCase)], ids=str)
def test_visible_pairs_are_those_of_the_mask(case):
    inputs = case.make_inputs()
    options = {name: case.options[name] for name in ("causal", "window")}
    mask = AttentionSpec.of(inputs["q"], inputs["k"], inputs["v"], **options).mask
    s = case.shape
    assert case.visible_pairs() == int(mask.dense_mask(s["M"], s["N"]).sum())


def test_work_is_counted_as_the_papers_do():
    full = AttentionCase("full", batch=2, heads=4, q_len=32, head_dim=8)
    assert full.work().flops == 4 * 2 * 4 * 32 * 32 * 8
    assert full.work(backward=True).flops == 2.5 * full.work().flops
    assert full.work().bytes == 4 * full.make_inputs()["q"].nbytes
    causal = AttentionCase("causal", batch=2, heads=4, q_len=32, head_dim=8, causal=True)
    assert causal.work().flops == full.work().flops * (32 * 33 / 2) / 32**2
    rows = LayerNormCase("rows", shape=(16, 32), dtype=torch.bfloat16)
    assert rows.work().bytes == 2 * 16 * 32 * 2
    assert rows.work(backward=True).bytes == 3 * 16 * 32 * 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_peer_agrees_where_there_is_one(case):
    case = case.with_dtype(torch.float64)
    inputs = case.make_inputs()
    peer = case.torch_peer(inputs)
    if peer is None or case.dropout_p > 0:
        return
    torch.testing.assert_close(peer(), case.run(inputs, backend="reference")[0])


def test_torch_peer_is_missing_where_torch_has_no_such_operator():
    assert AttentionCase("softcap", softcap=3.0).torch_peer({}) is None
    assert AttentionCase("late", q_len=3, k_len=9, causal=True).torch_peer({}) is None
    assert SoftmaxCase("mask", mask="boolean").torch_peer({}) is None


def test_goals_are_those_of_the_table():
    goals = {benchmark.id: benchmark.goal for benchmark in table.BENCHMARKS}
    assert goals["attention-causal_s4096_d128-bfloat16-backward"] == 2.1
    assert goals["attention-decode_gqa_l4096_d128-bfloat16-forward"] == 25.0
    assert goals["layer_norm-256x768-bfloat16-backward"] == 2.5
    assert goals["softmax-fresh_64mb-float32-forward"] == 2.0
    assert all(goals.values())


def test_fresh_outputs_are_64_mb():
    fresh = [b for b in table.BENCHMARKS if b.default_allocator]
    assert len(fresh) == 4
    for benchmark in fresh:
        assert benchmark.case.work().bytes == 2 * 2**26
