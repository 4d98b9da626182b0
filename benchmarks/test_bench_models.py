"""Whole models: a training step, and the making of tokens."""

import pytest

from fastattn.bench import models

RUNS = [(entry, contender) for entry in models.BENCHMARKS for contender in entry.contenders]


@pytest.mark.parametrize(
    ("entry", "contender"), RUNS, ids=[f"{entry.id}-{contender}" for entry, contender in RUNS]
)
def test_model(benchmark, request, entry, contender):
    if not entry.quick and not request.config.getoption("--full"):
        pytest.skip("needs --full")
    if reason := entry.unavailable():
        pytest.skip(reason)
    tokens = entry.make_tokens()
    made = entry.models()
    models.check(entry, made, tokens)
    benchmark.group = entry.id
    benchmark.pedantic(entry.call(made[contender], tokens), rounds=3, warmup_rounds=2)
    benchmark.extra_info["tokens_per_s"] = round(entry.tokens / benchmark.stats.stats.median, 1)
