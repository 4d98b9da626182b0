"""On a GPU, where there is one: the same table, graphs, streams, a second device."""

import pytest
import torch

import fastattn
from fastattn import proof, testing
from fastattn.backends import BACKENDS as BY_NAME
from fastattn.bench.gpu_table import BENCHMARKS
from fastattn.cases import CASES, DTYPES

TRITON = BY_NAME["triton"]
if TRITON.device != "cuda" or TRITON.unavailable() is not None:
    pytest.skip("no GPU for the kernels", allow_module_level=True)
SERVED = [case.with_dtype(dtype) for case in CASES for dtype in DTYPES if dtype.itemsize < 8]
# As large as what is timed: many tiles, descriptors, specialised warps, split keys, looped rows.
LARGE = dict.fromkeys(benchmark.case for benchmark in BENCHMARKS if benchmark.quick)


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_case(case):
    with testing.poisoned_empty():
        verdict = proof.prove(case, "triton")
    assert verdict.passed and not verdict.refusal, verdict.problem or verdict.refusal


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_case(case):
    verdict = proof.prove(case, "triton")
    assert verdict.passed and not verdict.refusal, verdict.problem or verdict.refusal


def step(x, q):
    """Of every family, forward and backward."""
    x, q = x.detach().requires_grad_(), q.detach().requires_grad_()
    y = fastattn.softmax(fastattn.layer_norm(x, x.shape[-1:]))
    out = fastattn.attention(q, q, q, causal=True)
    return torch.autograd.grad((y.square().sum() + out.square().sum()), (x, q))


def inputs(device="cuda"):
    generator = torch.Generator().manual_seed(0)
    x, q = (
        torch.randn(64, 512, generator=generator),
        torch.randn(2, 4, 128, 64, generator=generator),
    )
    return x.to(device), q.to(device, torch.bfloat16)


def test_triton_is_the_first_choice():
    _, q = inputs()
    assert fastattn.explain(q, q, q).backend == "triton"


def test_the_same_call_twice_gives_the_same_bits():
    for one, two in zip(step(*inputs()), step(*inputs()), strict=True):
        assert torch.equal(one, two)


def test_a_graph_replays_what_was_captured():
    x, q = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, q)  # compiles, which must not be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, q)
    x.mul_(2)
    q.mul_(0.5)
    graph.replay()
    for got, expected in zip(captured, step(x, q), strict=True):
        assert torch.equal(got, expected)


def test_two_streams():
    streams = [torch.cuda.Stream() for _ in range(2)]
    expected = step(*inputs())
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append([step(*inputs()) for _ in range(5)])
    torch.cuda.synchronize()
    for grads in (grads for runs in found for grads in runs):
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one():
    expected = step(*inputs())
    with torch.cuda.device(0):
        for got, there in zip(step(*inputs("cuda:1")), expected, strict=True):
            assert got.device.index == 1
            torch.testing.assert_close(got.cpu(), there.cpu())
