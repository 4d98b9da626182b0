"""Threads and processes: results do not depend on who else is running, and repeat to the bit."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from here import BACKENDS, KERNELS

from fastattn import proof, testing
from fastattn.cases import AttentionCase, LayerNormCase, SoftmaxCase

GQA = {"heads": 8, "kv_heads": 2}
# Enough work for many threads, divided in each way that the kernels have.
CASES = [
    AttentionCase("tiles", batch=1, heads=3, q_len=260, head_dim=40, causal=True),
    AttentionCase("groups", batch=1, q_len=200, k_len=310, head_dim=32, **GQA),
    AttentionCase("one_head", batch=1, heads=1, q_len=500, head_dim=64, causal=True),
    AttentionCase("few_queries", batch=1, heads=1, q_len=30, k_len=3000, head_dim=64),
    AttentionCase("decode", batch=1, q_len=1, k_len=9000, head_dim=64, **GQA),
    AttentionCase("decode_few", batch=1, q_len=4, k_len=5000, head_dim=64, sinks=True, **GQA),
    AttentionCase("dropout", batch=1, heads=1, q_len=300, head_dim=32, dropout_p=0.2),
    AttentionCase("bias", batch=2, heads=3, q_len=150, bias="additive", bias_shape="11qk"),
    AttentionCase("bias_keys", batch=2, heads=3, q_len=150, bias="additive", bias_shape="111k"),
    AttentionCase("bias_full", batch=1, heads=1, q_len=250, bias="additive"),
    AttentionCase("window", batch=1, heads=1, q_len=900, head_dim=64, window=(100, 20)),
    LayerNormCase("rows", shape=(900, 300), residual=True, dropout_p=0.1),
    LayerNormCase("wide", shape=(7, 40_000)),
    SoftmaxCase("rows", shape=(900, 300), mask="boolean"),
    SoftmaxCase("columns", shape=(300, 900), dim=0, log=True),
]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepared(case):
    """(case, inputs, output gradients)."""
    inputs = case.make_inputs(requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    shapes = [y.shape for y in case.run(inputs, "reference")]
    return case, inputs, [torch.randn(s, generator=generator).to(case.dtype) for s in shapes]


def run(case, inputs, cotangents, backend):
    """Outputs and gradients."""
    outputs = case.run(inputs, backend)
    cotangents = [g.to(y.dtype) for y, g in zip(outputs, cotangents, strict=True)]
    leaves = [x for x in inputs.values() if x.requires_grad]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, cotangents))


def results(case, backend):
    return run(*prepared(case), backend)


def assert_same_bits(got, expected):
    for mine, same in zip(got, expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), same.view(torch.uint8))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_and_repeatable_at_any_thread_count(case, count, backend):
    with threads(count):
        with testing.poisoned_empty():
            verdict = proof.prove(case, backend)
        assert verdict.passed, verdict.problem
        for dtype in (torch.float32, torch.bfloat16):
            first = results(case.with_dtype(dtype), backend)
            for _ in range(3):
                assert_same_bits(results(case.with_dtype(dtype), backend), first)


@pytest.mark.parametrize("count", [1, 2])
def test_eight_threads_at_once(count, backend):
    """Different calls side by side: to the bit what they are one after another."""
    jobs = [prepared(case) for case in CASES if not case.dropout_p]  # dropout shares a generator
    with threads(count):
        expected = [run(*job, backend) for job in jobs]

        def again(job):
            torch.set_num_threads(count)  # a thread starts with a count of its own
            return run(*job, backend)

        with ThreadPoolExecutor(8) as pool:
            for i, got in enumerate(pool.map(again, jobs * 3)):
                assert_same_bits(got, expected[i % len(jobs)])


def test_a_changing_thread_count(backend):
    case = AttentionCase("change", batch=1, heads=2, q_len=200, head_dim=32, causal=True)
    with threads(1):
        expected = results(case, backend)
    for count in (7, 1, 2, 16, 3, 1):
        with threads(count):
            for mine, same in zip(results(case, backend), expected, strict=True):
                torch.testing.assert_close(mine, same)


# -------------------------------------------------------------------------------------- processes

kernels = pytest.mark.parametrize("backend", KERNELS)
SMALL = [CASES[0], CASES[4], CASES[12], CASES[14]]


def work(backend, queue):
    torch.set_num_threads(1)  # torch's own operators hang in a forked child that uses its threads
    jobs = [prepared(case) for case in SMALL]
    torch.set_num_threads(2)
    queue.put([[x.tolist() for x in run(*job, backend)] for job in jobs])


@kernels
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_process(method, backend):
    """A child made after this process ran kernels on several threads."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    with threads(2):
        torch.randn(2000, 2000).exp().sum()
        expected = [results(case, backend) for case in SMALL]
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        child = context.Process(target=work, args=(backend, queue), daemon=True)
        child.start()
        try:
            answered = queue._reader.poll(120)
            assert answered, "the child hangs" if child.is_alive() else "the child died"
            got = queue.get()
        finally:
            child.kill()
            child.join()
    for mine, same in zip(got, expected, strict=True):
        for x, y in zip(mine, same, strict=True):
            torch.testing.assert_close(torch.tensor(x, dtype=y.dtype), y)


FIRST_CALL_IN_A_CHILD = """
import os, signal, sys, torch, fastattn
torch.set_num_threads(2)
torch.randn(2000, 2000).exp().sum()  # torch's threads are there, the kernels' first call is not yet
q = torch.randn(1, 4, 300, 64)
child = os.fork()
if child == 0:
    signal.alarm(60)
    out = fastattn.attention(q, q, q, backend=sys.argv[1])
    os._exit(0 if all(map(float.__ne__, out[0, 0, 0].tolist(), [0.0] * 64)) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_first_call_of_all_in_a_forked_child(backend):
    code = f"import sys; sys.path[:] = {sys.path!r}\n{FIRST_CALL_IN_A_CHILD}"
    assert subprocess.run([sys.executable, "-c", code, backend], timeout=120).returncode == 0


# ----------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, sys, torch, fastattn
threads, heads, causal, length = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "causal", 16384
torch.set_num_threads(threads)
def inputs(length):
    return [torch.randn(1, heads, length, 64).requires_grad_() for _ in range(3)]
def step(q, k, v):
    out = fastattn.attention(q, k, v, causal=causal, window=None if causal else (600, 600), backend="cpu")
    return out, torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
step(*inputs(700))
large = inputs(length)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, grads = step(*large)
ours = sum(x.nbytes for x in (out, *grads)) + 2 * heads * length * 4 + out.nbytes  # lse, delta, dout
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024 - ours)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU kernels here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("count", "heads", "mask"),
    [(2, 2, "causal"), (2, 1, "window"), (7, 2, "window"), (32, 1, "window")],
)
def test_memory_at_16384(count, heads, mask):
    """Beyond inputs and outputs under 64 MB, forward and backward; a matrix of scores is 1 GB."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{MEMORY}"
    child = subprocess.run(
        [sys.executable, "-c", code, str(count), str(heads), mask],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 64 * 2**20
