"""The language model example: it learns, resumes after a kill, and fused and naive agree."""

import json
import math

import pytest
import torch

pytest.importorskip("rich", reason="the examples need fastattn[examples]")
from examples_common import (  # noqa: F401, I001
    error_of,
    kill_at_first_checkpoint,
    losses,
    one_thread,
)

import data
import train_lm
import training
from baselines import UnigramModel

TINY = ["--steps=30", "--batch=2", "--context=32", "--lr=5e-3"]
TINY += ["--d-model=32", "--layers=2", "--heads=2", "--dropout=0", "--tokenizer=byte"]
TINY += ["--no-baselines"]


@pytest.fixture
def text(tmp_path):
    """A text with something to learn: sums, with spelled-out digits."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = (f"{words[i % 10]} and {words[i % 7]} is {i % 10 + i % 7}\n" for i in range(2000))
    path = tmp_path / "sums.txt"
    path.write_text("".join(lines))
    return path


def run(text, out, *extra):
    return train_lm.main([*TINY, "--data", str(text), "--out", str(out), *extra])


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_fused_and_naive_train_alike_and_learn(text, tmp_path, tokenizer):
    pytest.importorskip("matplotlib")
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    out = tmp_path / "out"
    metrics = run(
        text, out, "--attention=both", "--steps=60", f"--tokenizer={tokenizer}", "--vocab=300"
    )
    assert len(losses(metrics)) == len(losses(metrics, "naive")) == 60
    differences = [
        abs(a - b) for a, b in zip(losses(metrics), losses(metrics, "naive"), strict=True)
    ]
    assert max(differences) < 5e-6  # ten float32 roundings of a loss of about 5
    assert metrics["loss_difference_max"] == max(differences)
    assert losses(metrics)[0] > losses(metrics)[-1] + 1.0
    for one in metrics["runs"].values():
        assert one["perplexity"] < 0.8 * metrics["counted"]["unigram"]["perplexity"]
        assert math.exp(one["held_out"][-1][1]) == one["perplexity"]
        assert [step for step, _ in one["held_out"]] == [12, 24, 36, 48, 60]
    assert json.loads((out / "metrics.json").read_text())["runs"]["fused"]["losses"] == losses(
        metrics
    )
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["sample"]["continuation"]
    assert not list(out.glob("*.partial"))


def test_bfloat16_trains_alike_to_its_accuracy(text, tmp_path):
    metrics = run(text, tmp_path / "out", "--attention", "both", "--dtype", "bfloat16")
    exact = run(text, tmp_path / "exact")
    assert 0 < metrics["loss_difference_max"] < 0.05
    for a, b in zip(losses(metrics), losses(exact), strict=True):
        assert abs(a - b) < 0.05
    assert losses(metrics) != losses(exact)


def test_seeds_reproduce(text, tmp_path):
    first, again = (run(text, tmp_path / name, "--dropout", "0.1") for name in ("a", "b"))
    other = run(text, tmp_path / "c", "--dropout", "0.1", "--seed", "1")
    assert losses(first) == losses(again)
    assert first["sample"] == again["sample"]
    assert losses(first)[0] != losses(other)[0]


def test_a_killed_run_resumes_to_the_same_losses(text, tmp_path):
    """With dropout, so that the random state counts too."""
    options = ["--dropout", "0.1", "--steps", "60", "--save-every", "3"]
    whole = run(text, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    command = [*TINY, "--data", text, "--out", out, *options]
    kill_at_first_checkpoint("train_lm.py", command, out / "checkpoint.pt")
    assert not (out / "metrics.json").exists()

    (out / "checkpoint.pt.partial").write_bytes(b"half a checkpoint")
    resumed = run(text, out, *options, "--resume")
    assert 0 < resumed["resumed_at"] < 60
    assert losses(resumed) == losses(whole)
    assert resumed["runs"]["fused"]["held_out"] == whole["runs"]["fused"]["held_out"]
    assert resumed["sample"] == whole["sample"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_resuming_what_is_finished_or_never_began(text, tmp_path, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    options = ("--resume", "--tokenizer", tokenizer, "--vocab", "300")
    first = run(text, tmp_path / "out", *options)
    assert first["resumed_at"] == 0
    again = run(text, tmp_path / "out", *options)
    assert again["resumed_at"] == 30
    assert losses(again) == losses(first)


def test_a_checkpoint_of_another_run_is_refused(text, tmp_path, capsys):
    out = tmp_path / "out"
    run(text, out)
    common = [*TINY, "--data", text, "--out", out, "--resume"]
    assert "lr: 0.005 then, 0.01 now" in error_of(capsys, train_lm.main, *common, "--lr", "0.01")
    text.write_text(text.read_text().replace("seven", "sept"))
    assert "data: " in error_of(capsys, train_lm.main, *common)
    (out / "checkpoint.pt").write_bytes(b"something else")
    assert "is not a checkpoint" in error_of(capsys, train_lm.main, *common)


def test_bad_data(text, tmp_path, capsys):
    empty, blank, folder = tmp_path / "empty.txt", tmp_path / "blank.txt", tmp_path / "folder"
    empty.touch()
    blank.write_text("  \n\n")
    folder.mkdir()
    assert "no such file or folder" in error_of(
        capsys, train_lm.main, "--data", tmp_path / "missing"
    )
    assert "has no text" in error_of(capsys, train_lm.main, "--data", empty)
    assert "has no text" in error_of(capsys, train_lm.main, "--data", blank)
    assert "has no text" in error_of(capsys, train_lm.main, "--data", folder)
    assert "shorter context" in error_of(capsys, train_lm.main, "--data", text, "--context", 10**6)
    assert "multiple of n_heads" in error_of(capsys, train_lm.main, "--data", text, "--heads", 7)
    for named, expected in (
        (("--steps", -1), "--steps: must be a positive integer, got -1"),
        (("--steps", "ten"), "--steps: must be a positive integer, got ten"),
        (("--lr", "nan"), "--lr: must be a positive number, got nan"),
        (("--data-mb", 0), "--data-mb: must be a positive number, got 0"),
        (("--dropout", 1), "--dropout: must be in [0, 1), got 1"),
        (("--lstm-dropout", -0.1), "--lstm-dropout: must be in [0, 1), got -0.1"),
        (("--seed", -1), "--seed: must be an integer from 0 to 2^63 - 1, got -1"),
        (("--attention", "fusd"), "invalid choice: 'fusd'"),
    ):
        assert expected in error_of(capsys, train_lm.main, "--data", text, *named)
    assert "argument --device: abacus" in error_of(
        capsys, train_lm.main, "--data", text, "--device", "abacus"
    )
    assert f"--out {text}: " in error_of(capsys, train_lm.main, "--data", text, "--out", text)


def test_extras_are_missed_before_the_training(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    said = error_of(capsys, train_lm.main, "--data", text, "--out", tmp_path, "--tokenizer", "bpe")
    assert "needs matplotlib and tokenizers: pip install 'fastattn[examples]'" in said


@pytest.mark.parametrize("rate", ["1e5", "1e9"])  # NaN from held-out text, NaN from a step
def test_a_run_that_diverges_says_so(text, tmp_path, capsys, rate):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stopped:
        run(text, tmp_path, "--steps=2", f"--lr={rate}")
    assert stopped.value.code == 1
    assert "is nan: a lower --lr may help" in capsys.readouterr().err


def test_text_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / "sub" / "b.md").write_bytes(b"second")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    text = data.read_text(tmp_path, 1000)
    assert sorted(text.split(b"\n")) == [b"first", b"second"]
    assert data.read_text(tmp_path, 1000) == text
    assert data.read_text(tmp_path, 3) == text[:3]


def test_the_standard_library_is_the_default():
    text = data.read_text(None, 200_000)
    assert len(text) == 200_000
    assert text.count(b"\ndef ") + text.count(b"\nclass ") > 50
    assert data.read_text(None, 200_000) == text


def test_tokenizers_round_trip():
    text = "def f(x):\n\treturn 'é€😀' * x  # naïve\n".encode()
    assert data.ByteTokenizer().decode(data.ByteTokenizer().encode(text)) == text.decode()
    pytest.importorskip("tokenizers")
    bpe = data.BPETokenizer.train(text * 50, 280)
    assert bpe.vocab_size <= 280
    assert len(bpe.encode(text)) < len(text)
    assert bpe.decode(bpe.encode(text)) == text.decode()


def test_targets_are_the_inputs_one_token_on():
    tokens = torch.arange(100)
    for inputs, targets in (
        data.random_windows(tokens, 0, 5, 4, 8),
        data.even_windows(tokens, 4, 8),
    ):
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(inputs + 1, targets)
    again = data.random_windows(tokens, 0, 5, 4, 8)
    assert torch.equal(data.random_windows(tokens, 0, 5, 4, 8)[0], again[0])
    assert not torch.equal(data.random_windows(tokens, 0, 6, 4, 8)[0], again[0])
    reached = {data.random_windows(tokens, 0, i, 4, 8)[1].max().item() for i in range(300)}
    assert max(reached) == 99  # the last token is a target too
    inputs, _ = data.even_windows(tokens, 99, 8)
    assert len(inputs) == 12 and inputs.unique().numel() == inputs.numel()


def test_unigram_baseline():
    counted, targets = torch.tensor([0, 0, 0, 1]), torch.tensor([[0, 2]])
    loss = train_lm.count_text(UnigramModel, counted, (targets, targets), 3)["loss"]
    # with one added to each: 4, 2, 1 of 7
    assert loss == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)


def test_learning_rate():
    rates = [training.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.101


def test_baselines_stand_beside_the_transformer(text, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--baselines", "--ngram=3", "--steps=20"]
    metrics = run(text, tmp_path / "out", *options)
    assert list(metrics["runs"]) == ["fused", "lstm"]
    assert list(metrics["counted"]) == ["unigram", "ngram"]
    models = {**metrics["runs"], **metrics["counted"]}
    for model in models.values():
        assert 1.0 < model["perplexity"] < 256 and model["training_seconds"] > 0
        assert model["parameters"] > 0 and model["bits_per_byte"] > 0
    sizes = [run["parameters"] for run in metrics["runs"].values()]
    assert max(sizes) < 1.3 * min(sizes)
    assert models["ngram"]["perplexity"] < models["unigram"]["perplexity"]
    assert losses(metrics, "lstm")[-1] < losses(metrics, "lstm")[0] - 0.5
    again = run(text, tmp_path / "out", *options, "--resume")
    assert again["resumed_at"] == 20 and losses(again, "lstm") == losses(metrics, "lstm")


def test_what_is_named_beside_quick_holds():
    args = training.parse(train_lm.parser(), ["--quick"])
    assert (args.attention, args.steps) == ("both", 240)
    args = training.parse(train_lm.parser(), ["--quick", "--attention", "naive", "--steps", "7"])
    assert (args.attention, args.steps) == ("naive", 7)


def test_fused_beside_naive_drops_nothing_unless_asked():
    """Each draws its own, and their losses are to be the same."""
    beside = ["--attention", "both"]
    assert training.parse(train_lm.parser(), beside).dropout == 0.0
    assert training.parse(train_lm.parser(), ["--quick"]).dropout == 0.0
    assert training.parse(train_lm.parser(), [*beside, "--dropout", "0.2"]).dropout == 0.2
    assert training.parse(train_lm.parser(), []).dropout > 0.0
