"""Whole models in `fastattn bench`: the same work for everyone, times, peaks, reasons."""

import copy
import os
import sys

import pytest
import torch

from fastattn import testing
from fastattn.bench import memory, models, readme, report
from fastattn.bench.gpt2 import Gpt2Benchmark
from fastattn.bench.transformer import TransformerBenchmark
from fastattn.console import Console

TINY = {"layers": 2, "width": 32, "heads": 2, "vocabulary": 64}
SMALL = {
    "transformer": TransformerBenchmark("train_step", batch=1, length=32),
    "transformer_generate": TransformerBenchmark("generate", batch=1, length=20, new_tokens=3),
    "gpt2": Gpt2Benchmark("train_step", batch=1, length=32, goal=1e-3, **TINY),
    "gpt2_generate": Gpt2Benchmark("generate", batch=2, length=20, new_tokens=3, **TINY),
}


@pytest.fixture(params=SMALL)
def small(request):
    if request.param.startswith("gpt2"):
        pytest.importorskip("transformers", minversion="5")
    return SMALL[request.param]


def test_everyone_does_the_same_work(small):
    tokens = small.make_tokens()
    made = small.models()
    if small.new_tokens:
        texts = [small.call(model, tokens)() for model in made.values()]
        assert texts[0].shape == (small.batch, small.length + small.new_tokens)
        assert all(torch.equal(texts[0], text) for text in texts)
        return
    losses, start = [], copy.deepcopy(made["ours"].state_dict())
    for model in made.values():
        assert model.state_dict().keys() == start.keys()
        assert all(
            a is b for a, b in zip(model.parameters(), made["ours"].parameters(), strict=True)
        )
        model.load_state_dict(start)
        step = small.call(model, tokens)
        losses.append([step().item() for _ in range(3)])
    assert losses[0][2] < losses[0][0]  # it learns
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=1e-4)


def test_a_run_has_times_and_peaks(small, monkeypatch):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    result = models.run(small, 0.0)
    assert not result.failure and result.checked
    assert set(result.times) == set(small.contenders)
    assert set(result.ratios) == set(small.contenders) - {"ours"}
    assert result.ratio == min(ratio["median"] for ratio in result.ratios.values())
    assert result.reached is (True if small.goal else None)
    assert result.tokens == pytest.approx(small.tokens / result.times["ours"]["median"])
    assert f"| {result.id}, against " in readme.table([result])


def test_a_wrong_model_is_not_timed(small, monkeypatch):
    def wrong(*arguments):
        raise AssertionError("logits: error 3")

    monkeypatch.setattr(testing, "assert_error_law", wrong)
    result = models.run(small, 0.0)
    assert result.failure == "AssertionError: logits: error 3" and not result.times


def test_peaks_come_from_processes_of_their_own():
    if not memory.measurable():
        pytest.skip("no /proc")
    train, _ = models.choose(op="transformer")
    result = report.Result(train.id, "transformer", "", "train_step", "float32", {})
    models._measure_peaks(train, result)
    assert set(result.peaks_mb) == {"ours", "naive"}
    matrix = 2 * 4 * 1024 * 1024 * 4 / 1e6  # of a layer: batch, heads, S, S
    assert result.peaks_mb["naive"] > result.peaks_mb["ours"] + 4 * matrix


def test_without_transformers_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = models.run(SMALL["gpt2"], 0.0)
    assert not result.failure and not result.times
    reason = result.absent["ours"]
    assert reason == "transformers is not installed: pip install 'fastattn[transformers]'"
    console = Console()
    console.table("", report.columns(), [report.row(result)])
    assert "absent" in capsys.readouterr().out


def test_fork_each_says_who_failed(capfd):
    if not hasattr(os, "fork"):
        pytest.skip("no fork")

    def work(job):
        if job["name"] == "raises":
            raise ValueError("too long")
        if job["name"] == "dies":
            os._exit(9)
        return job | {"peak_mb": 1.0}

    memory.fork_each(({"name": name} for name in ("fine", "raises", "dies")), work)
    lines = capfd.readouterr().out.splitlines()
    assert '"peak_mb": 1.0' in lines[0] and '"absent": "too long"' in lines[1]
    assert '"name": "dies"' in lines[2] and "the process was killed" in lines[2]


def test_choose_filters():
    assert {b.op for b in models.choose(full=True)} == {"transformer", "task", "gpt2"}
    assert all(b.op == "gpt2" for b in models.choose(full=True, op="gpt2"))
    assert not models.choose(dtype="bfloat16")
    assert [b.id for b in models.choose(pattern="gpt2*s1024*step")] == [
        "gpt2-b1_s1024-float32-train_step"
    ]
    assert all(b.quick for b in models.choose())
