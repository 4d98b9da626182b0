"""The reference Transformer, fused against naive: a training step, and the making of tokens."""

import pytest

from fastattn.bench import contenders, transformer


@pytest.mark.parametrize("contender", [contenders.OURS, contenders.NAIVE])
@pytest.mark.parametrize("entry", transformer.BENCHMARKS, ids=lambda entry: entry.id)
def test_transformer(benchmark, request, entry, contender):
    if not entry.quick and not request.config.getoption("--full"):
        pytest.skip("needs --full")
    made, tokens = transformer.models(entry), transformer.tokens_of(entry)
    transformer.check(made, tokens)
    benchmark.group = entry.id
    benchmark.pedantic(transformer.calls(entry, made, tokens)[contender], rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens_per_s"] = round(entry.tokens / benchmark.stats.stats.median, 1)
