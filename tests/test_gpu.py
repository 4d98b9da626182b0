"""On a GPU, where there is one: the same table, graphs, streams, a second device."""

import pytest
import torch

import fastattn
from fastattn import proof, testing
from fastattn.backends import BACKENDS
from fastattn.bench import gpu_table
from fastattn.cases import CASES, DTYPES, LayerNormCase, SoftmaxCase

HERE = [
    name
    for name in ("triton", "cuda")
    if BACKENDS[name].device == "cuda" and BACKENDS[name].unavailable() is None
]
if not HERE:
    pytest.skip("no GPU for the kernels", allow_module_level=True)
SERVED = [case.with_dtype(dtype) for case in CASES for dtype in DTYPES if dtype.itemsize < 8]
# As large as what is timed: many tiles, descriptors, specialised warps, split keys, looped rows.
LARGE = dict.fromkeys(benchmark.case for benchmark in gpu_table.BENCHMARKS if benchmark.quick)


@pytest.fixture(params=HERE)
def backend(request):
    return request.param


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_case(case, backend):
    with testing.poisoned_empty():
        verdict = proof.prove(case, backend)
    if backend == "cuda" and verdict.refusal:  # attention in float32, head dims over 256
        pytest.skip(verdict.refusal)
    assert verdict.passed and not verdict.refusal, verdict.problem or verdict.refusal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [150_001, 400_000, 2_000_000])
def test_rows_wider_than_shared_memory(width, dtype, backend):
    """The cuda backend's clusters on sm_90, of two to eight blocks; then rows too wide for them."""
    for case in (LayerNormCase, SoftmaxCase):
        verdict = proof.prove(case("wide", shape=(3, width)).with_dtype(dtype), backend)
        assert verdict.passed and not verdict.refusal, verdict.problem or verdict.refusal


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_case(case, backend):
    verdict = proof.prove(case, backend)
    if backend == "cuda" and verdict.refusal:
        pytest.skip(verdict.refusal)
    assert verdict.passed and not verdict.refusal, verdict.problem or verdict.refusal


def step(backend, x, q):
    """Of every family, forward and backward."""
    x, q = x.detach().requires_grad_(), q.detach().requires_grad_()
    y = fastattn.softmax(fastattn.layer_norm(x, x.shape[-1:], backend=backend), backend=backend)
    out = fastattn.attention(q, q, q, causal=True, backend=backend)
    return torch.autograd.grad((y.square().sum() + out.square().sum()), (x, q))


def inputs(device="cuda"):
    generator = torch.Generator().manual_seed(0)
    x, q = (
        torch.randn(64, 512, generator=generator),
        torch.randn(2, 4, 128, 64, generator=generator),
    )
    return x.to(device), q.to(device, torch.bfloat16)


@pytest.mark.skipif("triton" not in HERE, reason="no triton")
def test_triton_is_the_first_choice():
    _, q = inputs()
    assert fastattn.explain(q, q, q).backend == "triton"


def test_the_same_call_twice_gives_the_same_bits(backend):
    for one, two in zip(step(backend, *inputs()), step(backend, *inputs()), strict=True):
        assert torch.equal(one, two)


def test_a_graph_replays_what_was_captured(backend):
    x, q = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(backend, x, q)  # compiles, which must not be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(backend, x, q)
    x.mul_(2)
    q.mul_(0.5)
    graph.replay()
    for got, expected in zip(captured, step(backend, x, q), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_a_patched_model(dtype):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).to("cuda", dtype)
    assert fastattn.patch(model).replaced
    x = torch.randn(2, 32, 64, device="cuda", dtype=dtype)
    graphed = torch.cuda.make_graphed_callables(model, (x.clone().requires_grad_(),))
    for scale in (1.0, 0.5):
        results = []
        for call in (model.forward, graphed):
            leaf = (scale * x).requires_grad_()
            out = call(leaf)
            grads = torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])
            results.append([out.detach().clone(), *(grad.clone() for grad in grads)])
        torch.testing.assert_close(*results)


def test_two_streams(backend):
    streams = [torch.cuda.Stream() for _ in range(2)]
    expected = step(backend, *inputs())
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append([step(backend, *inputs()) for _ in range(5)])
    torch.cuda.synchronize()
    for grads in (grads for runs in found for grads in runs):
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one(backend):
    expected = step(backend, *inputs())
    with torch.cuda.device(0):
        for got, there in zip(step(backend, *inputs("cuda:1")), expected, strict=True):
            assert got.device.index == 1
            torch.testing.assert_close(got.cpu(), there.cpu())
