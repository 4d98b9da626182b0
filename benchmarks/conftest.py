"""What the pytest-benchmark suites share: one check a case, one benchmark a contender.

pytest benchmarks --benchmark-group-by=group
"""

import functools
import time

import pytest
import torch

from fastattn import proof
from fastattn.bench import allocator, contenders, timing
from fastattn.bench.table import choose

ROUNDS = 5


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every shape, not only the quick ones")


def pytest_configure(config):
    allocator.reuse_memory()


@functools.cache
def checked(case, backward):
    """Nothing is timed before this has passed."""
    return proof.prove(case, backward=backward)


@pytest.fixture
def race(benchmark):
    """Check a benchmark's case, then time one of its contenders."""

    def run(entry, name):
        verdict = checked(entry.case, entry.backward)
        if not verdict.passed:
            pytest.fail(f"wrong result, not timed: {verdict.problem}")
        made = contenders.make(entry, backend=None, flex=False)
        if name not in made.calls:
            pytest.skip(f"{name} has no such operator")
        benchmark.group = entry.id
        benchmark.extra_info |= {"backend": verdict.backend, "threads": torch.get_num_threads()}
        call = made.calls[name]
        call()  # warms up; a backward builds its graph here
        start = time.perf_counter()
        call()
        repeats = round(timing.SHORTEST_SAMPLE_S / (time.perf_counter() - start))
        benchmark.pedantic(call, rounds=ROUNDS, iterations=max(1, repeats))
        work = entry.case.work(entry.direction == "backward")
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["gflops"] = round(1e-9 * work.flops / seconds, 2)
        benchmark.extra_info["gbytes_per_s"] = round(1e-9 * work.bytes / seconds, 2)

    return run


def pytest_generate_tests(metafunc):
    if "entry" not in metafunc.fixturenames:
        return
    op = getattr(metafunc.module, "OP", None)
    if op is None:  # the Transformer has a table of its own
        return
    # The cases of fresh outputs need the allocator as it is: `fastattn bench` has them.
    entries = [
        e for e in choose(metafunc.config.getoption("--full"), op=op) if not e.default_allocator
    ]
    metafunc.parametrize("entry", entries, ids=lambda entry: entry.id)
    metafunc.parametrize("contender", [contenders.OURS, contenders.TORCH, contenders.NAIVE])
