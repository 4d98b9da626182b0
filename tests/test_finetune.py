"""Fine-tuning: the pre-trained start wins, resumes after a kill, and asks for what it needs."""

import json

import pytest
import torch
from examples_common import error_of, kill_at_first_checkpoint, one_thread  # noqa: F401

pytest.importorskip("rich", reason="the examples need fastattn[examples]")
pytest.importorskip("tokenizers", reason="the examples need fastattn[examples]")
pytest.importorskip("matplotlib", reason="the examples need fastattn[examples]")
import data
import finetune
import training
from bert_texts import TINY

FEW = ["--labels=2", "--steps=20", "--batch=8", "--lr=3e-3"]


def arguments(topic_texts, pretrained, out, *extra):
    return ["--data", topic_texts, "--pretrained", pretrained, "--out", out, *FEW, *extra]


def run(*args):
    return finetune.main([str(a) for a in arguments(*args)])


def accuracies(metrics):
    return {start: figures["accuracy"] for start, figures in metrics["starts"].items()}


def test_what_was_learned_before_helps_and_fused_and_naive_train_alike(
    topic_texts, pretrained, tmp_path
):
    metrics = run(topic_texts, pretrained, tmp_path, "--attention=both", "--seeds=2")
    assert metrics["topics"] == 4 and metrics["chance"] < 0.4
    found = accuracies(metrics)
    assert metrics["transfer"] == pytest.approx(found["pre-trained"] - found["from scratch"])
    assert metrics["transfer"] > 0.1  # smaller than what was seen
    for start in metrics["starts"].values():
        assert len(start["seeds"]) == 2
        for seed in start["seeds"]:
            assert seed["loss_difference_max"] < 5e-6
            assert seed["runs"]["fused"]["scores"] == seed["runs"]["naive"]["scores"]
    assert json.loads((tmp_path / "metrics.json").read_text())["transfer"] == metrics["transfer"]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_both_starts_differ_in_the_encoder_alone(topic_texts, pretrained):
    args = training.parse(finetune.parser(), ["--pretrained", str(pretrained)])
    pretrained = finetune.pretrain.pretrained(args, None)
    models = {}
    for start in finetune.STARTS:
        torch.manual_seed(3)
        models[start] = finetune.classifier(args, pretrained, 4, start, "fused")
    warm, cold = (models[start] for start in finetune.STARTS)
    assert torch.equal(warm.head.weight, cold.head.weight)
    for name, weight in warm.encoder.state_dict().items():
        assert torch.equal(weight, pretrained.weights[f"encoder.{name}"])
    assert not torch.equal(warm.encoder.embedding.token.weight, cold.encoder.embedding.token.weight)


def test_a_killed_run_resumes_to_the_same_accuracies(topic_texts, pretrained, tmp_path):
    options = ["--seeds=1", "--dropout=0.1", "--save-every=3"]
    whole = run(topic_texts, pretrained, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    # in its second training: the first is finished by then
    kill_at_first_checkpoint(
        "finetune.py", arguments(topic_texts, pretrained, out, *options), out / "from-scratch-0.pt"
    )
    assert not (out / "metrics.json").exists()
    resumed = run(topic_texts, pretrained, out, *options, "--resume")
    assert 20 < resumed["resumed_at"] < 40
    assert resumed["starts"] == {
        start: {
            **figures,
            "seeds": [
                {"runs": {"fused": {**s["runs"]["fused"], **timing(resumed, start)}}}
                for s in figures["seeds"]
            ],
        }
        for start, figures in whole["starts"].items()
    }


def timing(metrics, start):
    """What may differ between two runs: how long they took."""
    figures = metrics["starts"][start]["seeds"][0]["runs"]["fused"]
    return {k: v for k, v in figures.items() if k in ("step_ms", "training_seconds")}


def test_without_pretrained_weights_the_pretraining_runs_first(
    topic_texts, tmp_path, monkeypatch, capsys
):
    called = []
    real = finetune.pretrain.main

    def small(argv):
        called.append(argv)
        return real([*argv, *TINY, "--steps=2", "--batch=8"])

    monkeypatch.setattr(finetune.pretrain, "main", small)
    new = tmp_path / "new"
    run(topic_texts, new, tmp_path / "out", "--seeds=1", "--steps=1")
    out = ["--out", str(new), "--device", "cpu"]
    expected = ["--resume", *out, "--data", str(topic_texts)]
    assert called == [expected]
    assert "pre-training first" in capsys.readouterr().out

    state = torch.load(new / "checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 1}, new / "checkpoint.pt")  # as if killed after its first step
    run(topic_texts, new, tmp_path / "out2", "--seeds=1", "--steps=1", "--resume")
    assert called == [expected] * 2


def test_errors(topic_texts, pretrained, tmp_path, capsys):
    def said(*arguments):
        common = ("--data", topic_texts, "--pretrained", pretrained, "--out", tmp_path / "out")
        return error_of(capsys, finetune.main, *common, *arguments)

    assert "--d-model: the size is the pre-trained model's" in said("--d-model", 64)
    assert "fewer than two topics have 500 texts" in said("--labels", 500)
    assert "no such file or folder" in said("--data", tmp_path / "missing")
    (tmp_path / "checkpoint.pt").write_bytes(b"something else")
    assert "is not a checkpoint" in said("--pretrained", tmp_path)
    state = torch.load(pretrained / "checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 10}, tmp_path / "checkpoint.pt")
    assert "is no finished pre-training" in said("--pretrained", tmp_path)
    other = {**state, "settings": {**state["settings"], "task": "lm"}}
    torch.save(other, tmp_path / "checkpoint.pt")
    assert "is a checkpoint of the task lm, not bert" in said("--pretrained", tmp_path)
    run(topic_texts, pretrained, tmp_path / "out", "--seeds=1", "--steps=1")
    assert "steps: 1 then, 2 now" in said(*FEW, "--seeds", 1, "--steps", 2, "--resume")


def test_topics_are_the_most_frequent_with_enough_to_learn_from():
    held_out = [data.Passage(topic, ("x",)) for topic in "aaabbcccd"]
    learned = [data.Passage(topic, ("x",)) for topic in "aabbcd"]
    assert finetune.choose_topics(learned, held_out, most=2, labels=1) == ["a", "c"]
    assert finetune.choose_topics(learned, held_out, most=9, labels=2) == ["a", "b"]


def test_few_labels_are_as_many_of_each_topic():
    texts = finetune.Texts([[i] for i in range(60)], [i % 3 for i in range(60)])
    chosen = finetune.few(texts, 4, seed=0)
    assert sorted(chosen.topics) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(row[0] % 3 == topic for row, topic in zip(*chosen, strict=True))
    assert chosen == finetune.few(texts, 4, seed=0) != finetune.few(texts, 4, seed=1)


def test_mean_and_error():
    assert finetune.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))
    assert finetune.mean_and_error([5.0]) == (5.0, 0.0)
