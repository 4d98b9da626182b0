"""The scripts that use a trained language model: generation, attention pictures, kernels' share."""

import json

import pytest
import torch

pytest.importorskip("rich", reason="the examples need fastattn[examples]")
pytest.importorskip("matplotlib", reason="the examples need fastattn[examples]")
pytest.importorskip("tokenizers", reason="the examples need fastattn[examples]")
from examples_common import error_of, one_thread  # noqa: F401, I001

import generate
import kernels_share
import show_attention
import train_lm
from bert_texts import write_texts
from test_train_lm import TINY

from fastattn.bench import tasks
from fastattn.models.kernels import naive_attention


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that train_lm.py left, with fused and naive in it."""
    folder = tmp_path_factory.mktemp("runs")
    source = folder / "counting.txt"
    source.write_text("".join(f"{i % 50} and {i % 9} are {i % 50 + i % 9}.\n" for i in range(4000)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = ["--tokenizer=bpe", "--vocab=280", "--attention=both", "--lr=1e-2", "--steps=40"]
    train_lm.main([*TINY, *options, f"--data={source}", f"--out={folder / 'lm'}"])
    torch.set_num_threads(threads)
    return folder / "lm" / "checkpoint.pt"


def go_on(trained, out, *more):
    common = [f"--checkpoint={trained}", f"--out={out}", "--quick", "--max-new-tokens=8"]
    return generate.main([*common, *more])


def texts(metrics):
    return {way["way"]: way["texts"] for way in metrics["ways"]}


PROMPTS = ["--prompt=7 and", "--prompt=1", "--prompt=12 and 5 are"]


def test_every_way_of_going_on(trained, tmp_path):
    metrics = go_on(trained, tmp_path, *PROMPTS)
    made = texts(metrics)
    assert list(made) == list(generate.WAYS)
    assert all(len(rows) == 3 and all(rows) for rows in made.values())
    assert texts(go_on(trained, tmp_path, *PROMPTS)) == made  # seeded
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert texts(saved) == made
    model, tokenizer = train_lm.load(trained)
    for prompt, greedy, beam in zip(PROMPTS, made["greedy"], made["beam"], strict=True):
        ids = tokenizer.encode(prompt.removeprefix("--prompt=").encode())[None]
        alone = model.generate(ids, 8, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(alone) == greedy
        alone = model.generate(ids, 8, num_beams=4)[0, ids.shape[1] :]
        assert tokenizer.decode(alone) == beam


def test_greedy_text_is_the_same_by_all_kernels(trained, tmp_path):
    ways = [
        texts(go_on(trained, tmp_path, *PROMPTS, "--way=greedy", f"--attention={kind}"))
        for kind in ("fused", "naive", "torch")
    ]
    assert ways[0] == ways[1] == ways[2]


def test_stop_ends_a_text(trained, tmp_path):
    options = ["--way=greedy", "--way=beam", "--max-new-tokens=20", *PROMPTS]
    free = texts(go_on(trained, tmp_path, *options))["greedy"]
    stopped = texts(go_on(trained, tmp_path, *options, "--stop=."))
    assert any("." in text for text in free)
    for before, after in zip(free, stopped["greedy"], strict=True):
        assert before.startswith(after)
        assert ("." in before) == ("." in after)
        assert "." not in after[:-2]
    assert all("." not in text[:-2] for text in stopped["beam"])


def test_the_stream_is_the_text(trained):
    model, tokenizer = train_lm.load(trained)
    heard = generate.Stream(["1"], tokenizer)
    prompt = tokenizer.encode(b"1")[None]
    made = model.generate(prompt, 8, seed=0, stream=heard)
    assert heard.texts() == [tokenizer.decode(made[0, prompt.shape[1] :])]


def test_the_cache_is_measured(trained, tmp_path):
    metrics = go_on(
        trained, tmp_path, "--measure", "--lengths", "16", "48", "--way=greedy", "--attention=both"
    )
    rows = metrics["measured"]
    assert [(row["attention"], row["length"]) for row in rows] == [
        (kind, length) for kind in ("fused", "naive") for length in (16, 48)
    ]
    for row in rows:  # keys and values, 2 layers, 32 wide, float32
        assert row["cache_bytes"] == 2 * 2 * 32 * 4 * row["length"]
        assert row["cached_s"] > 0 and row["recomputed_s"] > 0
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")


def test_attention_is_shown_and_is_what_the_kernel_does(trained, tmp_path):
    metrics = show_attention.main([f"--checkpoint={trained}", f"--out={tmp_path}"])
    saved = json.loads((tmp_path / "attention.json").read_text())
    weights = torch.tensor(saved["weights"])
    length = len(metrics["tokens"])
    assert "".join(saved["tokens"]) == "The cat sat on the mat"
    assert weights.shape == (2, 2, length, length)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, length))
    assert weights.triu(1).abs().max() == 0  # nobody looks ahead
    assert weights[0, 0, -1].max() < 1.0
    assert 0 <= metrics["largest_difference"]["fused"] < 1e-5
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_bert_looks_both_ways(pretrained, tmp_path):
    metrics = show_attention.main(
        [
            f"--checkpoint={pretrained / 'checkpoint.pt'}",
            f"--out={tmp_path}",
            "--text=The rose $5",
            "--attention=both",
        ]
    )
    assert metrics["tokens"][0] == "[CLS]" and metrics["tokens"][-1] == "[SEP]"
    assert "".join(metrics["tokens"][1:-1]) == "The rose $5"
    weights = torch.tensor(json.loads((tmp_path / "attention.json").read_text())["weights"])
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert weights.triu(1).amax() > 0
    assert metrics["largest_difference"].keys() == {"fused", "naive"}
    assert max(metrics["largest_difference"].values()) < 1e-5


def test_a_kernel_that_is_wrong_is_noticed(trained):
    model, tokenizer = train_lm.load(trained)
    wrong = lambda *args, **options: 1.001 * naive_attention(*args, **options)
    with pytest.raises(AssertionError, match="not close"):
        show_attention.watch(model, tokenizer.encode(b"12 and 5")[None], wrong)


def test_without_a_model_a_tiny_one_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no runs/lm here
    monkeypatch.setattr(train_lm, "TRAINED_FOR", 3)
    for _ in range(2):  # the second finds the first's
        metrics = show_attention.main(["--out=out"])
    assert metrics["checkpoint"] == "out/tiny-model/checkpoint.pt"
    assert "There is no trained model here" in capsys.readouterr().out


def test_bad_checkpoints_and_prompts(trained, pretrained, tmp_path, capsys):
    out = f"--out={tmp_path}"
    model = f"--checkpoint={trained}"

    def said(*arguments):
        return error_of(capsys, generate.main, out, *arguments)

    assert "there is no file" in said(f"--checkpoint={tmp_path / 'none.pt'}")
    assert "there is no file" in said(f"--checkpoint={trained.parent}")  # a folder
    other = tmp_path / "other.pt"
    other.write_bytes(b"\0\1")
    assert "is not a checkpoint" in said(f"--checkpoint={other}")
    bert = pretrained / "checkpoint.pt"
    assert "is a checkpoint of the task bert, not lm" in said(f"--checkpoint={bert}")
    assert "must not be empty" in said(model, "--prompt=")
    assert "leaves no room" in said(model, f"--prompt={'long ' * 60}")
    assert "--top-p: must be in (0, 1], got 2" in said(model, "--top-p=2")
    assert "--top-k: must be a positive integer, got 0" in said(model, "--top-k=0")
    assert "--beams: must be a positive integer, got 0" in said(model, "--beams=0")
    assert "--temperature: must be a number of at least 0" in said(model, "--temperature=nan")
    assert "--length-penalty: must be a finite number" in said(model, "--length-penalty=inf")
    assert "no token has that in it" in said(model, "--stop=no such token")
    assert "--stop: must not be empty" in said(model, "--stop=")
    assert "--stop: '\\\\x': truncated" in said(model, "--stop=\\x")
    attention = [out, model, "--text"]
    assert "--text is empty" in error_of(capsys, show_attention.main, *attention, "")
    assert "the model reads 32" in error_of(capsys, show_attention.main, *attention, "long " * 60)


@pytest.fixture
def small_share(monkeypatch, tmp_path):
    """Every task at a tiny size."""
    small = [type(b)("train_step", 2, 32, width=32, layers=1) for b in tasks.BENCHMARKS[1:]]
    monkeypatch.setattr(tasks, "BENCHMARKS", tuple(small))
    monkeypatch.setattr(kernels_share.models, "_measure_peaks", lambda benchmark, result: None)
    texts = write_texts(tmp_path / "texts", passages=20)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"number {i} and more\tof {i}\n" for i in range(200)))
    size = ("--batch=4", "--d-model=32", "--layers=1", "--heads=2", "--vocab=300")
    options = {
        "language model": (*size, "--context=16", f"--data={texts}"),
        "BERT": (*size, "--context=32", f"--data={texts}"),
        "fine-tuning": ("--labels=2", f"--data={texts}"),
        "translation": (*size, f"--data={pairs}"),
        "summary": (*size, f"--data={pairs}"),
    }
    for name, training in kernels_share.TRAININGS.items():
        tiny = training._replace(options=(*training.options, *options[name]))
        monkeypatch.setitem(kernels_share.TRAININGS, name, tiny)


def test_the_kernels_share(small_share, tmp_path):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    pytest.importorskip("polib")
    options = [f"--out={tmp_path}", "--seconds=0.01", "--steps=5", "--resume"]
    metrics = kernels_share.main(options)
    assert len(metrics["tasks"]) == 5
    for row in metrics["tasks"].values():
        assert row["checked"] == "error law passed"
        assert row["step_ms"].keys() == {"fused", "torch", "naive"}
        assert row["over_fused"].keys() == {"torch", "naive"}
    assert metrics["trained"].keys() == kernels_share.TRAININGS.keys()
    for run in metrics["trained"].values():
        assert [len(losses) for losses in run["losses"].values()] == [5, 5]
        assert run["loss_difference_max"] < 5e-6
    assert kernels_share.main(options)["trained"] == metrics["trained"]  # all was there
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["fused", "naive"])
def test_the_kernels_share_with_losses_of_one_kind(small_share, tmp_path, monkeypatch, kind):
    chosen = {"language model": kernels_share.TRAININGS["language model"]}
    monkeypatch.setattr(kernels_share, "TRAININGS", chosen)
    metrics = kernels_share.main(
        [f"--out={tmp_path}", "--seconds=0.01", "--steps=5", f"--attention={kind}"]
    )
    run = metrics["trained"]["language model"]
    assert run.keys() == {"losses"} and run["losses"].keys() == {kind}
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", tasks.BENCHMARKS[1:], ids=lambda b: b.task)
def test_tasks_learn_alike_on_all_kernels(task):
    """Everyone's losses, and padding that changes nothing."""
    small = type(task)("train_step", 8, 32, width=32, layers=1, vocabulary=50)
    tokens = small.make_tokens()
    curves = []
    for contender in small.contenders:
        step = small.stepper(small.model(contender))(tokens)
        curves.append([step().item() for _ in range(5)])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=5e-6)
    assert curves[0][-1] < curves[0][0]
