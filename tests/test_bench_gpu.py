"""`fastattn bench --device cuda` without one: everything but the device is real. Events and peers of
the tests stand for the GPU's; tensors lie in the CPU's memory."""

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastattn import cli, proof
from fastattn.bench import command, contenders, gpu, gpu_table, overhead, peers, report, runner
from fastattn.bench.results import Report, Result
from fastattn.bench.table import Benchmark
from fastattn.cases import AttentionCase, LayerNormCase, SoftmaxCase

CPU = torch.device("cpu")


class Event:
    """Of a stream that is never behind."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def device(monkeypatch):
    """A GPU, but for the GPU."""
    properties = SimpleNamespace(
        name="a GPU", major=9, minor=0, multi_processor_count=132, total_memory=80e9, L2_cache_size=1024
    )  # fmt: skip
    for name, replacement in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda: "a GPU",
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(gpu, "device", lambda: CPU)
    monkeypatch.setattr(gpu, "GEMM_SIZE", 64)
    monkeypatch.setattr(gpu, "COPY_BYTES", 2**16)
    monkeypatch.setattr(gpu, "RUNS", 3)
    monkeypatch.setattr(gpu, "FILLER_BYTES", 2**10)
    monkeypatch.setattr(command, "QUICK_BUDGET_S", 0.0)
    monkeypatch.setattr(overhead, "ROUNDS", 2)


@pytest.fixture
def liger(monkeypatch):
    """Liger's functions, by what they are documented to compute."""
    module = ModuleType("liger_kernel.transformers.functional")
    module.liger_softmax = lambda x: F.softmax(x, -1)
    module.liger_layer_norm = lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps)
    module.liger_rms_norm = lambda x, w, eps, offset, casting, in_place: F.rms_norm(
        x, x.shape[-1:], w, eps
    )
    for name in ("liger_kernel", "liger_kernel.transformers", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    found = peers.find_spec
    monkeypatch.setattr(peers, "find_spec", lambda n: module if n == "liger_kernel" else found(n))


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes seconds; whether it is asked is what matters here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def attention_case(**changes):
    sizes = {"batch": 1, "heads": 2, "q_len": 32, "head_dim": 16, "return_lse": False}
    return AttentionCase("tiny", **(sizes | changes))


TINY = (
    Benchmark("causal", attention_case(causal=True), "forward", True, flex=True, gpu=True, own_goal=0.001),
    Benchmark("causal", attention_case(causal=True), "backward", True, gpu=True, own_goal=1e6),
    Benchmark("small", attention_case(), "call", True, gpu=True),
    *(
        Benchmark("layer_norm", LayerNormCase(f"9x{n}", shape=(9, n)), "forward", True, gpu=True, roof_goal=1e-9)
        for n in (8, 16, 32)
    ),
    Benchmark("layer_norm", LayerNormCase("9x8", shape=(9, 8)), "backward", True, gpu=True, own_goal=2.0, rival="torch"),
    Benchmark("softmax", SoftmaxCase("9x8", shape=(9, 8)), "forward", True, gpu=True, roof_goal=1e3),
)  # fmt: skip


# ------------------------------------------------------------------------------------ whole runs


def test_a_run_writes_json_and_plots(device, liger, uncompiled, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_table, "BENCHMARKS", TINY)
    status = cli.main(["bench", "--device", "cuda", "--backend", "reference"])
    text = capsys.readouterr().out
    assert status == 0, text

    raw = json.loads((tmp_path / "benchmarks/results/cuda.json").read_text())
    assert raw["machine"]["gpu"] == "a GPU" and raw["machine"]["gpu_capability"] == "9.0"
    assert set(raw["ceilings"]["arithmetic"]) == {"float32", "bfloat16", "float16"}
    assert raw["ceilings"]["copy"] > 0
    assert {"attention", "softmax backward", "decode"} < set(raw["host_us"])
    found = Report.load(tmp_path / "benchmarks/results/cuda.json")
    forward, backward, small, *rows = found.results
    assert not any(result.failure for result in found.results)
    assert {"ours", "flash", "compile", "flex"} <= set(forward.times)
    assert set(forward.absent) == {"cudnn", "efficient", "fa3"}  # on a CPU, of torch's
    assert forward.absent["fa3"] == "FlashAttention 3 is not installed"
    assert {"ours", "flash", "compile"} <= set(backward.times)
    assert {"ours", "torch", "liger", "compile"} == set(rows[0].times)
    assert forward.reached is True and backward.reached is False
    assert forward.rival == min(forward.ratios, key=lambda n: forward.ratios[n]["median"])
    assert rows[3].rival == "torch"
    assert rows[0].reached is True and rows[-1].reached is False  # by the share of the roof
    assert small.direction == "call" and small.reached is None

    page = (tmp_path / "benchmarks/results/cuda.html").read_text()
    for words in (
        "a GPU",
        "Roofline",
        "Rate against the width",
        "Liger",
        "torch.compile",
        "Host, a call",
    ):
        assert words in page, words
    assert page.count("<svg") >= 5
    for words in (
        "compute capability 9.0",
        "132 multiprocessors",
        "Layer norm, forward",
        "of 100000%",
    ):
        assert words in text, words
    assert "cudnn" in text and "liger" in text


def test_a_wrong_kernel_is_not_timed(device, uncompiled, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_table, "BENCHMARKS", TINY[:1])
    wrong = proof.Verdict("case", "attention", "reference", problem="out: error 3")
    monkeypatch.setattr(proof, "prove", lambda *a, **k: wrong)
    assert cli.main(["bench", "--device", "cuda", "--backend", "reference"]) == 1
    assert "out: error 3" in capsys.readouterr().out
    (result,) = Report.load(tmp_path / "benchmarks/results/cuda.json").results
    assert not result.times


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_it_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: no CUDA or HIP device (torch sees none)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_list_needs_no_device(capsys):
    assert cli.main(["bench", "--device", "cuda", "--list", "--full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "attention-causal_s16384_d128-bfloat16-forward  goal 0.92x" in lines
    assert "attention-causal_s512_d128-bfloat16-forward  goal 1.1x" in lines
    assert "layer_norm-16384x4096-bfloat16-backward  goal 2x  goal 85% of roof" in lines


# -------------------------------------------------------------------------------------- the table


def test_the_configurations_and_their_goals():
    """B x S of 16,384 tokens, a width of 2048; forward 4 B H S^2 D, causal half, backward 2.5 times."""
    found = {b.id: b for b in gpu_table.BENCHMARKS}
    assert len(found) == len(gpu_table.BENCHMARKS)
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        for head_dim in (64, 128):
            for kind in ("full", "causal"):
                b = found[f"attention-{kind}_s{length}_d{head_dim}-bfloat16-forward"]
                s = b.case.shape
                assert s["B"] * s["M"] == 16384 and s["H"] * s["D"] == 2048
                flops = 4 * s["B"] * s["H"] * length**2 * head_dim / (2 if kind == "causal" else 1)
                assert b.case.work().flops == pytest.approx(flops, rel=0.003)
                assert b.case.work(True).flops == pytest.approx(2.5 * flops, rel=0.003)
    goals = {
        "attention-full_s2048_d128-bfloat16-forward": (0.92, None),
        "attention-full_s1024_d128-bfloat16-forward": (None, None),
        "attention-causal_s1024_d128-bfloat16-forward": (1.10, None),
        "attention-full_s8192_d64-bfloat16-forward": (1.10, None),
        "attention-causal_s4096_d128-bfloat16-backward": (1.03, None),
        "attention-decode_gqa_l8192_d128-bfloat16-forward": (None, 0.90),
        "layer_norm-65536x1024-bfloat16-forward": (None, 0.95),
        "softmax-65536x1024-bfloat16-forward": (1.1, None),
        "softmax-2048x32768-float32-forward": (1.0, None),
        "softmax-1024x65536-bfloat16-forward": (None, 0.97),
    }
    for name, expected in goals.items():
        assert (found[name].goal, found[name].roof_goal) == expected, name
    decode = found["attention-decode_gqa_l8192_d128-bfloat16-forward"].case
    assert decode.work().bytes > 100e6


# ------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize(
    "case",
    [
        attention_case(causal=True),
        attention_case(heads=4, kv_heads=2),
        LayerNormCase("rows"),
        LayerNormCase("rms", rms=True),
        SoftmaxCase("rows"),
    ],
    ids=["attention", "gqa", "layer_norm", "rms_norm", "softmax"],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_peers_compute_the_same(case, direction, liger, uncompiled):
    benchmark = Benchmark("kind", case, direction, True, gpu=True)
    made = contenders.make(benchmark, "reference", flex=True)
    assert len(made.calls) >= 3, made.absent
    results = {name: call() for name, call in made.calls.items()}
    for name in made.calls:
        torch.testing.assert_close(results[name], results["ours"], atol=1e-5, rtol=1e-4)


def test_a_window_by_flex_attention_is_ours(uncompiled):
    case = attention_case(causal=True, window=(5, None), q_len=40)
    made = contenders.make(
        Benchmark("window", case, "forward", True, flex=True, gpu=True), None, True
    )
    torch.testing.assert_close(made.calls["flex"](), made.calls["ours"](), atol=1e-5, rtol=1e-4)
    assert made.absent["flash"] == "torch has no such operator"


def test_who_cannot_take_part_says_why(monkeypatch):
    case = attention_case(q_len=64)
    monkeypatch.setattr(peers, "LARGEST_MATRIX", 100)
    made = contenders.make(Benchmark("full", case, "forward", True, gpu=True), "reference", True)
    assert made.absent["compile"] == "plain code would hold the whole matrix of scores"
    assert "cudnn" in made.absent and "Error" in made.absent["cudnn"]
    norm = Benchmark("layer_norm", LayerNormCase("rows"), "forward", True, gpu=True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert contenders.make(norm, "reference", True).absent == {
        "liger": "liger-kernel is not installed"
    }


def test_each_backend_of_torch_is_asked_by_name(monkeypatch):
    asked = []
    original = torch.nn.attention.sdpa_kernel

    def spy(backend):
        asked.append(backend.name)
        return original(backend)

    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", spy)
    case = attention_case()
    inputs = case.make_inputs()
    for name, make in peers.of(case, inputs).items():
        if name in ("cudnn", "flash", "efficient"):
            try:
                make()()
            except RuntimeError:
                assert name != "flash"
    assert asked == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"]


# ------------------------------------------------------------------------------- clock and report


def test_the_clock_is_the_devices(device, monkeypatch):
    """What passes between the events of a call is its time; the rest, such as clearing the cache
    before it, is not."""
    now, log = [0.0], []

    class Clock(Event):
        def record(self):
            self.at = now[0]

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("sleep", cycles)))
    stopwatch = gpu.Stopwatch(CPU)
    assert stopwatch.filler.numel() == 2**11  # twice the cache

    class Filler:
        def zero_(self):
            now[0] += 5.0
            log.append("clear")

    stopwatch.filler = Filler()

    def call():
        now[0] += 0.25
        log.append("call")

    assert stopwatch.sample(call, 4) == pytest.approx(0.25)
    assert log == [("sleep", 4 * gpu.AHEAD_CYCLES), *["clear", "call"] * 4]


def test_small_calls_are_timed_by_the_host(device, uncompiled):
    def never(call, repeats):
        raise AssertionError("the device's clock")

    options = runner.Options(1, 0.0, "reference", device="cpu")
    for direction in ("call", "call_backward"):
        benchmark = Benchmark("small", attention_case(), direction, True, gpu=True)
        result = runner.Runner(options, never).run(benchmark)
        assert not result.failure and result.times["ours"]["median"] > 0
    assert "the device's clock" in runner.Runner(options, never).run(TINY[0]).failure


def make_result(**changes):
    fields = {
        "id": "attention-causal_s4096_d128-bfloat16-forward", "op": "attention", "kind": "causal",
        "direction": "forward", "dtype": "bfloat16", "shape": {}, "goal": 0.92, "device": "cuda",
        "times": {n: {"median": 1e-3} for n in ("ours", "cudnn", "flash")},
        "ratios": {"cudnn": {"median": 0.95, "low": 0.9, "high": 1.0}, "flash": {"median": 1.3, "low": 1.2, "high": 1.4}},
        "absent": {"liger": "not installed"}, "gflops": 5.5e5, "bound": "compute", "of_ceiling": 0.7,
    }  # fmt: skip
    return Result(**(fields | changes))


def test_the_rival_is_the_fastest_peer():
    result = make_result()
    assert result.rival == "cudnn" and result.ratio == 0.95 and result.reached is True
    assert make_result(goal=1.0).reached is False
    assert make_result(against="flash").ratio == 1.3
    assert make_result(against="torch").ratio is None
    assert make_result(roof_goal=0.9).reached is False  # both goals count
    assert make_result(ratios={}).reached is None


def test_the_table_has_a_column_for_each_peer():
    names = report.contenders_of([make_result()])
    assert names == ("ours", "cudnn", "flash", "liger")
    cells = [
        c if isinstance(c, str) else c[0] for c in report.row(make_result(roof_goal=0.5), names)
    ]
    assert len(cells) == len(report.columns(names))
    assert cells[4] == "absent"
    assert cells[5:] == ["0.95x", "0.90-1.00", "0.92x", "ok", "550 TFLOP/s", "70% of 50%"]
    failed = report.row(make_result(failure="wrong"), names)
    assert len(failed) == len(report.columns(names))


def test_proof_samples_a_head_of_a_batch(monkeypatch):
    monkeypatch.setattr(proof, "LARGE", 0)
    for changes in (
        {"batch": 3},
        {"batch": 3, "heads": 4, "kv_heads": 2},
        {"batch": 2, "dropout_p": 0.4},
    ):
        case = attention_case(**changes, causal=True)
        assert proof._by_heads(case)
        assert proof.prove(case, "reference").passed
