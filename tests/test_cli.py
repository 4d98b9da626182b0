"""The commands `fastattn info`, `check` and `bench`, as a person types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import cli, proof
from fastattn.cases import AttentionCase, LayerNormCase
from fastattn.console import Console


def run_fastattn(folder, *arguments):
    """In a folder of its own, on the package that these tests import."""
    package = Path(fastattn.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "fastattn", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(package)},
        timeout=120,
    )


def test_info_names_the_machine_and_every_backend(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "reference  available" in text
    assert "cpu " in text


def test_info_runs_as_a_program(tmp_path):
    done = run_fastattn(tmp_path, "info")
    assert done.returncode == 0, done.stderr
    assert "Backends" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["fly"], ["bench", "--threads", "0"]])
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_check_of_an_unknown_backend_is_status_2(capsys):
    assert cli.main(["check", "--backend", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().out


def test_check_passes_through_processes_of_their_own(capsys):
    assert cli.main(["check", "--op", "softmax", "--backend", "reference"]) == 0
    assert "all passed" in capsys.readouterr().out


def test_check_fails_with_the_case_that_failed(monkeypatch, capsys):
    wrong = proof.Verdict("attention-full-float32", "attention", "reference", problem="off by 1")
    monkeypatch.setattr(proof, "verdicts", lambda target: iter([wrong]))
    assert proof.check(Console(), "attention", "reference", verbose=False) == 1
    text = capsys.readouterr().out
    assert "FAILED reference  attention-full-float32: off by 1" in text


def test_check_reports_a_process_that_died(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (verdict,) = proof.verdicts(proof.Target("reference", op="softmax"))
    assert not verdict.passed
    assert "exit status 1" in verdict.problem


def test_prove_finds_a_wrong_backend(monkeypatch):
    from fastattn.backends.reference import ReferenceBackend

    right = ReferenceBackend.attention_backward

    def wrong(self, *arguments):
        dq, dk, dv, *rest = right(self, *arguments)
        return (dq, dk if dk is None else dk.roll(1, 2), dv, *rest)

    case = AttentionCase("wrong", q_len=8)
    assert proof.prove(case, "reference").passed
    monkeypatch.setattr(ReferenceBackend, "attention_backward", wrong)
    # float64 is the oracle and comes from the same backend, so only float32 may be wrong here
    monkeypatch.setattr(
        ReferenceBackend,
        "attention_backward",
        lambda self, call, *rest: (right if call.q.dtype == torch.float64 else wrong)(
            self, call, *rest
        ),
    )
    verdict = proof.prove(case, "reference")
    assert "dk" in verdict.problem


def test_prove_samples_heads_of_large_cases(monkeypatch):
    monkeypatch.setattr(proof, "LARGE", 0)
    case = AttentionCase("large", batch=1, heads=4, kv_heads=2, q_len=9, causal=True)
    assert proof._by_heads(case)
    assert proof.prove(case, "reference").passed
    biased = AttentionCase("biased", batch=1, heads=2, q_len=9, bias="additive", bias_shape="1hqk")
    assert proof.prove(biased, "reference").passed
    dropped = AttentionCase("dropped", batch=1, heads=2, q_len=9, dropout_p=0.5)
    assert proof.prove(dropped, "reference").passed


def test_prove_reports_a_crash_as_a_problem(monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(proof.testing, "compare_layer_norm", broken)
    assert proof.prove(LayerNormCase("crash")).problem == "no such luck"


def test_bench_list_names_benchmarks_and_goals(capsys):
    assert cli.main(["bench", "--list", "--op", "softmax", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "softmax-4096x1024-float32-forward  goal 1.3x" in lines
    assert all(line.startswith("softmax-") and "float32" in line for line in lines)


def test_bench_without_a_match_is_status_2(capsys):
    assert cli.main(["bench", "--case", "nothing_like_it"]) == 2


def test_bench_refuses_a_bad_old_report_before_it_runs(tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text("{}")
    assert cli.main(["bench", "--compare", str(old)]) == 2
    assert "not a report" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "abacus"], "unknown backend 'abacus': cpu, triton, cuda, reference"),
        (["--json", f"{__file__}/out.json"], "cannot write"),
        (["--html", f"{__file__}/out.html"], "cannot write"),
    ],
)
def test_bench_refuses_before_it_runs(arguments, message, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastattn {fastattn.__version__}\n"


def test_bench_says_what_to_install_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--html", str(tmp_path / "x.html")]) == 2
    assert "pip install 'fastattn[bench]'" in capsys.readouterr().out


def test_without_rich_tables_are_plain(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    console = Console()
    assert console.rich is None
    console.table("title", ("name", "value"), [["a", ("1.0", "green")], ["long name", "10.25"]])
    with console.progress(2, "work") as advance:
        advance("one")
        advance("two")
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == [
        "title",
        "name       value",
        "---------  -----",
        "a            1.0",
        "long name  10.25",
    ]
    assert "work 2/2  two" in captured.err


def test_bench_runs_and_writes_its_reports(tmp_path):
    """The whole way once, in a process of its own: the allocator's settings stay there."""
    figures, page = tmp_path / "b.json", tmp_path / "b.html"
    arguments = ("--case", "small", "--backend", "reference", "--threads", "1")
    arguments += ("--json", "b.json", "--html", "b.html")
    done = run_fastattn(tmp_path, "bench", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(figures.read_text())
    assert report["machine"]["threads"] == 1
    assert report["machine"]["torch"] == torch.__version__
    assert {r["direction"] for r in report["results"]} == {"call", "call_backward"}
    for result in report["results"]:
        assert result["checked"] and not result["failure"]
        assert set(result["times"]) == {"ours", "torch", "naive"}
        assert result["ratios"]["torch"]["low"] <= result["ratios"]["torch"]["high"]
    assert "<svg" in page.read_text()


def test_every_usable_instruction_set_is_proved(monkeypatch):
    from fastattn.backends import BACKENDS
    from fastattn.bench import machine

    record = {"isas": ["avx2"], "usable": ["avx2", "baseline"], "reason": "", "compiler": "c++"}
    monkeypatch.setattr(machine, "build_record", lambda: record)
    monkeypatch.setattr(type(BACKENDS["cpu"]), "unavailable", lambda self: None)
    best, other = proof.targets("softmax", "cpu")
    assert (best.isa, best.every_dtype, other.isa, other.every_dtype) == (
        "avx2",
        True,
        "baseline",
        False,
    )
    assert {case.dtype for case in other.cases()} == {torch.float32, torch.bfloat16}
    assert len(list(best.cases())) == 2 * len(list(other.cases()))
