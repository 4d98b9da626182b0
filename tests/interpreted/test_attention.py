"""What the attention kernels have beyond the suites of every backend: other ways to fetch tiles, the
careful second pass, split keys, the order of tiles."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from test_case_table import PAIRS, VARIANTS

import fastattn
from fastattn import proof, testing
from fastattn.backends.triton import (
    attention_backward,
    attention_config,
    attention_forward,
    attention_specialized,
)
from fastattn.backends.triton.attention_config import BackwardConfig, Config
from fastattn.backends.triton.attention_forward import Order, tile_order
from fastattn.cases import AttentionCase

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows


def prove(case):
    with testing.poisoned_empty():
        verdict = proof.prove(case, "triton")
    assert not verdict.refusal and verdict.passed, verdict.problem or verdict.refusal


# ------------------------------------------------------------------------------------- variants

SMALL = {"q_len": 21, "k_len": 35, "head_dim": 8, "heads": 4, "batch": 1}


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_of_variants(pair):
    prove(AttentionCase("+".join(pair), **(SMALL | VARIANTS[pair[0]] | VARIANTS[pair[1]])))


@pytest.mark.parametrize("head_dim", [1, 15, 17, 127, 257])
def test_head_dims(head_dim):
    prove(AttentionCase("d", batch=1, q_len=9, k_len=20, head_dim=head_dim, causal=True))
    prove(AttentionCase("dv", batch=1, q_len=9, k_len=20, head_dim=24, value_dim=head_dim))


# ------------------------------------------------------------------- descriptors, special warps


@pytest.fixture(params=["descriptors", "specialized"])
def way(request, monkeypatch):
    """Tiles by descriptors of the host; or by those of the kernel, and warps with special tasks."""
    special = request.param == "specialized"
    forward = Config(32, 32, 4, 1, tma=True, specialize=special)
    monkeypatch.setattr(attention_forward, "forward_config", lambda *_: forward)
    backward = BackwardConfig(*[Config(32, 32, 4, 1, tma=True)] * 4)
    monkeypatch.setattr(attention_backward, "backward_config", lambda *_: backward)
    return request.param


WALKED = [
    AttentionCase("full", q_len=40, k_len=64),
    AttentionCase("causal", q_len=70, k_len=80, causal=True, kv_heads=1),
    AttentionCase("window", q_len=90, k_len=100, window=(20, 5)),
    AttentionCase("rows_without_keys", q_len=70, k_len=40, causal=True),
    AttentionCase("value_dim", head_dim=24, value_dim=40, causal=True, layout="bshd"),
    AttentionCase("sinks", sinks=True, heads=8, batch=1, causal=True),
    AttentionCase("packed", layout="packed", causal=True),
    AttentionCase("dropout", dropout_p=0.3),  # not by special warps, as what follows
    AttentionCase("softcap", softcap=5.0, magnitude=4.0),
    AttentionCase("offset", layout="offset", head_dim=24),  # and not by descriptors either
    AttentionCase("expanded", layout="expanded"),
]


@pytest.mark.parametrize("case", WALKED, ids=lambda case: case.name)
def test_other_ways_to_fetch(case, way, monkeypatch):
    launches = []
    run = attention_forward.Launch.run
    monkeypatch.setattr(
        attention_forward.Launch, "run", lambda self: launches.append(self) or run(self)
    )
    prove(case.with_dtype(torch.bfloat16))
    first = launches[0].constants["static"]
    by_descriptor = case.layout not in ("offset", "expanded")
    special = way == "specialized" and by_descriptor and not (case.dropout_p or case.softcap)
    assert first.tma == (2 if special else 4 if by_descriptor else 0)
    assert first.specialize == special


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 40), (40, 1)])
def test_one_row_has_no_stride_that_a_descriptor_could_use(q_len, k_len, way):
    """Its stride may be 1, as here, where descriptors ask for multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, n, generator=generator).mT for n in (q_len, k_len, k_len))
    q, k, v = (x.contiguous() if x.shape[2] > 1 else x for x in (q.half(), k.half(), v.half()))
    assert 1 in (q.stride(2), k.stride(2))
    mine = attention(q, k, v)
    for x, same in zip(mine, attention(*(x.clone() for x in (q, k, v))), strict=True):
        assert torch.equal(x, same)


# --------------------------------------------------------------------------- the careful second pass


def attention(q, k, v, **keywords):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = fastattn.attention(*inputs, return_lse=True, backend="triton", **keywords)
    return out, lse, *torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), lse * 0 + 1))


def numbers(q_len, k_len, heads=2, kv_heads=2, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    shapes = ((1, heads, q_len, 16), (1, kv_heads, k_len, 16), (1, kv_heads, k_len, 16))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", "qkv")
def test_a_nan_stays_where_it_is_seen(name, way):
    inputs = dict(zip("qkv", numbers(70, 70), strict=True))
    clean = attention(**inputs, causal=True)
    at = 45
    dirty = {n: x.clone() for n, x in inputs.items()}
    dirty[name][:, :, at, 3] = math.nan
    touched = torch.arange(70) == at if name == "q" else torch.arange(70) >= at
    out, lse, dq, _, dv = attention(**dirty, causal=True)
    assert torch.equal(out[0, 0].isnan().any(-1), touched)
    for got, same in ((out, clean[0]), (lse, clean[1]), (dq, clean[2])):
        torch.testing.assert_close(got[:, :, ~touched], same[:, :, ~touched], rtol=0.02, atol=5e-3)
    assert not dv[:, :, at + 1 :].isnan().any() or name != "q"


def test_logits_out_of_reach(way):
    q, k, v = numbers(40, 70)
    out, lse, *grads = attention(q * 1e15, k * 1e15, v)
    best = (q.double() @ k.double().mT).argmax(-1)
    assert torch.equal(out, torch.gather(v, 2, best[..., None].expand_as(out)))
    assert all(x.isfinite().all() for x in (lse, *grads))


def test_careful_and_common_agree():
    """An infinity in one head's last key makes no difference to a row that does not see it, beyond
    the law's one rounding at the magnitude of the result."""
    q, k, v = numbers(64, 64, dtype=torch.float16)
    bias = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).half()
    keywords = {"bias": bias, "softcap": 3.0, "causal": True}
    common = attention(q, k, v, **keywords)
    v[:, :, 63] = math.inf
    careful = attention(q, k, v, **keywords)
    for mine, same in zip(careful[:3], common[:3], strict=True):
        mine, same = mine[:, :, :63].detach(), same[:, :, :63].detach()
        rounding = torch.finfo(same.dtype).eps * same.abs().max().item()
        torch.testing.assert_close(mine, same, rtol=0, atol=rounding)


# ---------------------------------------------------------------------------- precision of float32

ALLOWED = {
    "legacy": lambda: torch.set_float32_matmul_precision("high"),
    "products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def precision():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"  # else it keeps what the line before says


@pytest.mark.parametrize("allow", ALLOWED)
def test_tf32_where_torch_may_use_it(allow, precision):
    """By each of torch's names for it: one of them makes another raise."""
    inputs = numbers(40, 50, dtype=torch.float32)
    exact = fastattn.attention(*(x.double() for x in inputs), backend="reference")

    def error():
        return (attention(*inputs)[0].double() - exact).abs().max().item()

    assert error() < 2e-6
    ALLOWED[allow]()
    assert 2e-5 < error() < 5e-3


# ------------------------------------------------------------------------ split keys, tiles, repeats


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["grouped", "long", "window", "smallest", "nan"])
def test_split_keys(kind, splits, monkeypatch):
    def split(programs, k_len, block_n, processors):  # the last parts may be empty
        return splits, -(-k_len // (block_n * splits)) * block_n

    monkeypatch.setattr(attention_forward, "key_splits", split)
    q, k, v = numbers(40 if kind == "long" else 3, 250, heads=4, dtype=torch.float32)
    keywords = {"sinks": torch.randn(4)}
    if kind == "window":  # most parts see nothing
        keywords["window"] = (40, 0)
    if kind == "smallest":  # maxima whose differences say nothing: the sums have to
        keywords = {"bias": torch.full((3, 250), torch.finfo(torch.float32).min)}
    if kind == "nan":
        v[:, 0, 200] = math.nan
    mine = fastattn.attention(q, k, v, return_lse=True, backend="triton", **keywords)
    same = fastattn.attention(q, k, v, return_lse=True, backend="reference", **keywords)
    for x, y in zip(mine, same, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


def test_enough_parts_and_no_empty_ones():
    for programs, k_len, block_n in itertools.product((1, 7, 400), (0, 1, 500, 70_000), (16, 64)):
        splits, chunk = attention_config.key_splits(programs, k_len, block_n, 132)
        assert chunk % block_n == 0
        assert (splits - 1) * chunk < max(k_len, 1) <= splits * chunk


@triton.jit
def order_kernel(out, order):
    tile, head = tile_order(order)
    tl.store(out + tl.program_id(0), head * order.tiles + tile)


@pytest.mark.parametrize(
    ("tiles", "heads", "together"), [(1, 1, 1), (5, 7, 3), (4, 6, 1), (3, 4, 9)]
)
def test_every_tile_once(tiles, heads, together):
    out = torch.full((tiles * heads,), -1, dtype=torch.int32)
    order_kernel[(tiles * heads,)](out, Order(tiles, heads, together))
    assert out.sort().values.tolist() == list(range(tiles * heads))
    assert out[0] % tiles == tiles - 1  # the longest first


def test_repeats_to_the_bit():
    case = AttentionCase("twice", heads=4, kv_heads=2, causal=True, bias="additive", sinks=True)
    first, second = (
        testing.check_attention("triton", **case.make_inputs(requires_grad=True), causal=True)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_special_warps_serve_plain_calls_alone():
    arguments = ("sm_90", torch.bfloat16, 128, 128)
    assert attention_config.forward_config(*arguments, 4096, 4096, True).specialize
    assert not attention_config.forward_config(*arguments, 4096, 4096, False).specialize
    assert not attention_config.forward_config(*arguments, 1, 4096, True).specialize
    assert not attention_config.forward_config(
        "sm_120", *arguments[1:], 4096, 4096, True
    ).specialize
    assert attention_specialized.SCANNED_ROWS % attention_forward.CAREFUL_ROWS.value == 0
