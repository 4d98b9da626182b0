"""The parts of `fastattn bench`: timing, contenders, results, report, comparison."""

import ast
import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.bench import (
    ceilings,
    compare,
    contenders,
    html,
    machine,
    memory,
    naive,
    report,
    runner,
    timing,
)
from fastattn.bench.results import Peak, Report, Result
from fastattn.bench.table import BENCHMARKS, Benchmark, choose
from fastattn.cases import AttentionCase, LayerNormCase, SoftmaxCase
from fastattn.console import Console

ROOFS = ceilings.Ceilings({"float32": 100.0, "bfloat16": 50.0, "float16": 1.0}, 20.0)
TINY = AttentionCase("tiny", batch=1, heads=2, q_len=16, head_dim=8, return_lse=False)


def spread(value, low=None, high=None):
    return {"median": value, "low": low or value, "high": high or value, "rounds": 5}


def make_result(name="full_s512_d64", ratio=1.5, goal=1.3, direction="forward", **changes):
    result = Result(
        id=f"attention-{name}-float32-{direction}",
        op="attention",
        kind="full",
        direction=direction,
        dtype="float32",
        shape={"B": 1, "H": 8, "K": 8, "M": int(name[6:9]), "N": 512, "D": 64, "E": 64},
        goal=goal,
        times={"ours": spread(0.01), "torch": spread(0.01 * ratio)},
        ratios={"torch": spread(ratio, 0.9 * ratio, 1.1 * ratio)},
        gflops=80.0,
        gbytes=5.0,
        intensity=16.0,
        bound="compute",
        of_ceiling=0.8,
    )
    for field, value in changes.items():
        setattr(result, field, value)
    return result


def make_report(*results):
    machine = {
        "cpu": "a <CPU>",
        "cores": 2,
        "threads": 2,
        "flags": ["avx2"],
        "fastattn": "0",
        "commit": None,
        "torch": "2",
        "python": "3",
        "others": 0.0,
    }
    peaks = [
        Peak("ours", 1024, "float32", False, 3.0, 1.0, 0.1),
        Peak("naive", 1024, "float32", False, absent="would need about 9 GB"),
    ]
    return Report(
        preset="quick",
        machine=machine,
        ceilings=ROOFS.to_json(),
        results=list(results),
        memory=peaks,
    )


# ------------------------------------------------------------------------------------------ timing


@pytest.fixture
def takes(monkeypatch):
    """Makes calls that take a given time on a clock that nothing else moves."""
    now, order = 0.0, []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def make(name, seconds):
        def call():
            nonlocal now
            now += seconds
            order.append(name)

        return call

    make.order = order
    return make


def test_interleave_takes_turns_and_lets_guests_go(takes):
    calls = {name: takes(name, 3e-3) for name in "abg"}
    samples = timing.interleave(calls, budget_s=0.0, guests=frozenset("g"))
    assert takes.order == list("aabbggabggbaabgbaab")  # first, each warms up twice
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 5, "b": 5, "g": 3}
    assert samples["a"] == pytest.approx([3e-3] * 5)


def test_a_slow_guest_is_called_once(takes):
    calls = {"fast": takes("fast", 3e-3), "slow": takes("slow", 1.5)}
    samples = timing.interleave(calls, budget_s=0.0, guests=frozenset(["slow"]))
    assert (len(samples["fast"]), len(samples["slow"])) == (timing.MIN_ROUNDS, 1)


def test_slow_calls_have_fewer_rounds(takes):
    samples = timing.interleave({"slow": takes("slow", 1.5)}, budget_s=0.0)
    assert len(samples["slow"]) == timing.GUEST_ROUNDS


def test_rounds_go_on_for_the_budget(takes):
    samples = timing.interleave({"a": takes("a", 0.01)}, budget_s=0.095)
    assert len(samples["a"]) == 10


def test_short_calls_are_timed_many_at_once(takes):
    samples = timing.interleave({"short": takes("short", 2e-4)}, budget_s=0.0)
    assert len(takes.order) == 2 + 10 * timing.MIN_ROUNDS
    assert timing.Timing.of(samples["short"]).median == pytest.approx(2e-4)


def test_a_ratio_is_of_the_rounds_that_both_ran():
    ratio = timing.ratio([2.0, 6.0], [1.0, 2.0, 50.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (2.5, 2.0, 3.0, 2)


# -------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        AttentionCase("causal", q_len=5, k_len=9, heads=4, kv_heads=2, causal=True),
        AttentionCase("bias", bias="additive"),
        LayerNormCase("rows"),
        SoftmaxCase("rows"),
    ],
    ids=str,
)
def test_naive_computes_the_same(case):
    inputs = case.make_inputs()
    torch.testing.assert_close(naive.run(case, inputs), case.run(inputs, "reference")[0])


@pytest.mark.parametrize("direction", ["forward", "backward", "call", "call_backward"])
def test_contenders_return_the_same(direction):
    made = contenders.make(Benchmark("small", TINY, direction, True), "reference", flex=False)
    assert set(made.calls) == {"ours", "torch", "naive"}
    results = {name: call() for name, call in made.calls.items()}
    for name in ("torch", "naive"):
        torch.testing.assert_close(results[name], results["ours"], atol=1e-5, rtol=1e-4)
    if direction == "backward":  # once more on the same graph
        torch.testing.assert_close(made.calls["ours"](), results["ours"])
    if direction == "forward":
        assert not results["ours"].requires_grad


def test_flex_that_cannot_run_says_why(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(contenders, "_flex_attention", broken)
    benchmark = Benchmark("full", TINY, "forward", True, flex=True)
    assert contenders.make(benchmark, None, flex=True).absent == {
        "flex": "RuntimeError: no compiler"
    }
    assert contenders.make(benchmark, None, flex=False).absent == {}


# ------------------------------------------------------------------------------------------ runner


def options():
    return runner.Options(torch.get_num_threads(), budget_s=0.0, backend="reference")


@pytest.mark.parametrize("case", [TINY, LayerNormCase("rows"), SoftmaxCase("rows")], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_run_has_times_rates_and_a_check(case, direction):
    result = runner.Runner(options()).run(Benchmark("full", case, direction, True))
    assert not result.failure
    assert result.checked
    assert result.ratio == result.ratios["torch"]["median"]
    work = case.work(direction == "backward")
    assert result.gflops == pytest.approx(1e-9 * work.flops / result.times["ours"]["median"])
    assert result.gbytes > 0


def test_a_wrong_result_is_never_timed(monkeypatch):
    wrong = runner.proof.Verdict("case", "attention", "cpu", problem="dk: error 3")
    monkeypatch.setattr(runner.proof, "prove", lambda *a, **k: wrong)
    result = runner.Runner(options()).run(Benchmark("full", TINY, "forward", True))
    assert result.failure == "dk: error 3"
    assert not result.times


def test_forward_and_backward_share_a_check(monkeypatch):
    proved = []

    def prove(case, backend, backward, device):
        proved.append(backward)
        return runner.proof.Verdict(str(case), case.op, "reference")

    monkeypatch.setattr(runner.proof, "prove", prove)
    pair = [Benchmark("full", TINY, direction, True) for direction in ("forward", "backward")]
    assert len(list(runner.Runner(options()).run_all(pair))) == 2
    assert proved == [True]


def test_roofs():
    assert ROOFS.compute("float32") == ROOFS.compute("bfloat16") == ROOFS.compute("float16") == 100
    result = make_result(times={"ours": spread(1e-3)})
    long = AttentionCase("long", batch=1, heads=1, q_len=512, head_dim=64)
    runner.rate(Benchmark("full", long, "forward", True), result)
    ROOFS.hold_against(result)
    assert result.bound == "compute"
    assert result.of_ceiling == pytest.approx(4 * 512 * 512 * 64 / 1e-3 / 100e9)
    decode = AttentionCase("decode", batch=1, heads=1, q_len=1, k_len=512, head_dim=64)
    runner.rate(Benchmark("decode_mha", decode, "forward", True), result)
    ROOFS.hold_against(result)
    assert result.bound == "memory"
    assert result.of_ceiling == pytest.approx(4 * 2 * (512 + 1) * 64 / 1e-3 / 20e9)
    better = ROOFS.or_better(ceilings.Ceilings({"float32": 1, "bfloat16": 70, "float16": 1}, 30.0))
    assert (better.arithmetic["float32"], better.arithmetic["bfloat16"], better.copy) == (
        100.0,
        70,
        30.0,
    )


def test_no_kernel_is_faster_than_bare_multiply_adds():
    roofs = ceilings.measure(budget_s=0.02)
    assert set(roofs.arithmetic) == {"float32", "bfloat16", "float16"}
    q = torch.randn(1, 4, 512, 64)
    seconds = ceilings.best_of(lambda: fastattn.attention(q, q, q), budget_s=0.1)
    achieved = 4e-9 * 4 * 512 * 512 * 64 / seconds
    assert 0 < achieved < roofs.compute("float32")


def test_choose_filters():
    quick, full = choose(), choose(full=True)
    assert 0 < len(quick) < len(full) == len(BENCHMARKS)
    assert all(b.case.op == "softmax" for b in choose(op="softmax"))
    assert all(b.case.dtype == torch.float16 for b in choose(dtype="float16"))
    assert {b.case.name for b in choose(pattern="*full_s4096_d128-float32*")} == {"full_s4096_d128"}


# ------------------------------------------------------------------------------------------ memory


def test_memory_of_naive_attention_is_the_matrix(monkeypatch):
    monkeypatch.setattr(memory, "LONGEST", 1024)
    jobs = [Peak(name, 1024, "float32", False) for name in ("naive", "torch")]
    naive_peak, torch_peak = memory.measure(jobs, threads=1, backend=None)
    if naive_peak.absent:
        pytest.skip(naive_peak.absent)
    matrix = 8 * 1024 * 1024 * 4 / 1e6
    assert 1.5 * matrix < naive_peak.extra_mb < 6 * matrix
    assert torch_peak.extra_mb < matrix


# ------------------------------------------------------------------------------------------ report


def test_a_report_comes_back_from_json(tmp_path):
    made = make_report(make_result(), make_result("full_s999_d64"))
    made.save(tmp_path / "deep" / "r.json")
    assert Report.load(tmp_path / "deep" / "r.json") == made


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}'])
def test_a_file_that_is_no_report_is_a_value_error(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"old\.json"):
        Report.load(path)


def test_the_table_shows_ratio_goal_and_verdict():
    cells = [c if isinstance(c, str) else c[0] for c in report.row(make_result(ratio=1.5))]
    assert len(cells) == len(report.columns())
    assert cells[0] == "full_s512_d64-float32"
    assert cells[5:] == ["1.50x", "1.35-1.65", "1.3x", "ok", "80 GFLOP/s", "80%"]
    below = report.row(make_result(ratio=1.2))
    assert ("below", "red") in below
    failed = report.row(make_result(failure="dk is wrong"))
    assert len(failed) == len(report.columns())
    assert failed[1][0] == "failed"


def test_the_terminal_shows_everything(capsys):
    wrong = make_result("full_s999_d64", failure="dk is wrong", times={}, ratios={})
    right = make_result(direction="backward", ratio=1.0)
    report.show(Console(), make_report(make_result(), right, wrong))
    text = capsys.readouterr().out
    assert "Attention, backward alone" in text
    assert "1 of 2 goals reached, 1 cases failed" in text
    assert "FAILED attention-full_s999_d64-float32-forward: dk is wrong" in text
    assert "would need about 9 GB" in text


def test_the_page_stands_alone_and_is_escaped(tmp_path):
    made = make_report(make_result(), make_result("full_s999_d64"))
    html.save(made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a &lt;CPU&gt;" in page
    assert page.count("<svg") >= 3  # speed-ups, roofline, time against length
    for outside in ("<script", "<link", 'src="http', "@import"):
        assert outside not in page


# --------------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("ratio", "word"), [(1.5, ""), (1.52, ""), (2.5, "faster"), (0.7, "slower")]
)
def test_compare_says_what_moved(ratio, word):
    assert compare.verdict(make_result(ratio=1.5), make_result(ratio=ratio)) == word


def test_compare_calls_nothing_moved_within_the_noise():
    new = make_result(ratio=2.0)
    new.ratios["torch"]["low"] = 1.4  # one of its rounds was as slow as before
    assert compare.verdict(make_result(ratio=1.5), new) == ""


def test_compare_shows_moves_first_and_what_differs(capsys):
    old = make_report(make_result(), make_result("full_s999_d64"))
    new = copy.deepcopy(old)
    new.machine["torch"] = "3"
    new.results[1] = make_result("full_s999_d64", ratio=3.0)
    new.results.append(make_result("full_s777_d64"))
    assert [moved for *_, moved in compare.changes(old, new)] == ["faster", ""]
    compare.show(Console(), old, new)
    text = capsys.readouterr().out
    assert "torch: 2 -> 3" in text
    assert "1 faster, 0 slower, 1 unmoved, 1 without a counterpart" in text


# ------------------------------------------------------------------------------------- the machine


def test_other_processes_are_noticed():
    others = machine.Others()
    if others.share() is None:
        pytest.skip("no /proc/stat")
    burn = [sys.executable, "-c", "import time\nt = time.time()\nwhile time.time() < t + 1: pass"]
    process = subprocess.Popen(burn)
    time.sleep(0.8)
    busy = others.share()
    process.wait()
    assert busy > 0.5 / os.cpu_count()


def test_reused_memory_has_no_page_faults():
    code = (
        "from fastattn.bench import allocator\nprint(allocator.describe(allocator.reuse_memory()))"
    )
    package = Path(machine.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(package)}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout
    described = ast.literal_eval(printed)
    if not described["reuse_memory"]:
        pytest.skip("not glibc")
    assert described["clone_64mb_faults"] < 100


def test_the_machine_is_described():
    described = machine.describe()
    assert described["torch"] == torch.__version__
    assert described["cores"] >= 1
    assert set(machine.build_record()) == {"isas", "usable", "reason", "compiler"}
