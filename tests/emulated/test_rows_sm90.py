"""Layer norm and softmax of rows that no block's shared memory holds, by clusters in the emulator,
against the definition; and rows that leave them for the kernels that read a row again."""

import math

import pytest
import torch

import fastattn
from fastattn import dispatch, proof, testing
from fastattn.cases import LayerNormCase, SoftmaxCase

BACKEND = dispatch.BACKENDS["cuda"]
DTYPES = (torch.float32, torch.bfloat16)
SHARED = 33 << 10  # of a block: 4 rounds of 16 bytes for each of its 512 threads
WIDTH = {torch.float32: 10001, torch.bfloat16: 18008}
BOTH_WAYS = ("forward", "backward")


@pytest.fixture(autouse=True)
def hopper():
    BACKEND.module.emulate(90, SHARED)
    BACKEND.module.take_launches()
    yield
    BACKEND.module.emulate(80)


def by_clusters():
    """The functions that clusters took since the last call."""
    names = BACKEND.module.take_launches()
    return {name.removesuffix(", clusters") for name in names if name.endswith(", clusters")}


def prove(case, dtype, expect=BOTH_WAYS):
    with testing.poisoned_empty():
        verdict = proof.prove(case.with_dtype(dtype), "cuda")
    assert verdict.passed and not verdict.refusal, verdict
    assert by_clusters() == {f"{case.op}_{way}" for way in expect}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rms": True, "bias": False, "layout": "packed"},
        {"residual": True, "layout": "offset"},
        {"residual": True, "rms": True, "bias": False},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_layer_norm(fields, dtype):
    prove(LayerNormCase("wide", shape=(3, WIDTH[dtype]), **fields), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"log": True, "layout": "offset"}, {"mask": "rows", "scale": 0.3}],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_softmax(fields, dtype):
    prove(SoftmaxCase("wide", shape=(3, WIDTH[dtype]), **fields), dtype)


@pytest.mark.parametrize(("width", "expect"), [(4096, ()), (4100, BOTH_WAYS[1:]), (66000, ())])
def test_rows_that_are_narrower_or_wider(width, expect):
    """Registers hold 4096 numbers, a block's shared memory 8192, and half as many of the backward's
    two tensors; eight blocks at most share a row."""
    prove(SoftmaxCase("wide", shape=(2, width)), torch.float32, expect)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "width", "shared", "read_again"),
    [
        (torch.bfloat16, 8193, 145 << 10, False),  # three rounds of 512 packs, 96 bytes each
        (torch.bfloat16, 8193, 143 << 10, "by 80"),
        (torch.float32, 10001, SHARED, "by 80"),
        (torch.bfloat16, 10001, SHARED, True),
    ],
)
def test_sums_beside_the_row(dtype, width, shared, read_again, capability):
    """dweight and dbias, where a block, or the blocks of a cluster, have room for their sums."""
    BACKEND.module.emulate(capability, shared)
    case = LayerNormCase("wide", shape=(5, width))
    with testing.poisoned_empty():
        verdict = proof.prove(case.with_dtype(dtype), "cuda")
    assert verdict.passed and not verdict.refusal, verdict
    again = "layer_norm_backward, weights" in BACKEND.module.take_launches()
    assert again == (capability == 80 if read_again == "by 80" else read_again)


def test_older_devices_read_such_rows_again():
    BACKEND.module.emulate(80, SHARED)
    prove(SoftmaxCase("wide", shape=(2, 10001)), torch.float32, ())


@pytest.mark.parametrize("at", [0, 3000, 9999])
def test_a_nan_reaches_its_row_alone(at):
    x = torch.randn(3, 10001)
    x[1, at] = math.nan
    for y in (
        fastattn.softmax(x, backend="cuda"),
        fastattn.layer_norm(x, (10001,), backend="cuda"),
    ):
        assert torch.equal(y.isnan().all(-1), torch.tensor([False, True, False]))
        assert torch.equal(y.isnan().any(-1), torch.tensor([False, True, False]))


def test_a_constant_row_has_no_variance():
    x = torch.full((2, 10001), 12345.678)
    assert torch.equal(fastattn.layer_norm(x, (10001,), backend="cuda"), torch.zeros_like(x))


def test_repeats_to_the_bit():
    x = torch.randn(2, 10001)
    results = [fastattn.layer_norm(x, (10001,), backend="cuda") for _ in range(2)]
    assert torch.equal(*results)
    assert by_clusters() == {"layer_norm_forward"}
