"""Demonstrations: how they are picked, what a prompt asks, and that the pick can be told to matter."""

import json
import math

import pytest
import torch
from examples_common import error_of, kill_at_first_checkpoint, losses, one_thread  # noqa: F401

pytest.importorskip("rich", reason="the examples need fastattn[examples]")
pytest.importorskip("tokenizers", reason="the examples need fastattn[examples]")
pytest.importorskip("matplotlib", reason="the examples need fastattn[examples]")
import pretrain
import select_demonstrations as script
import training

from fastattn.models.transformer import IGNORE

SMALL = ["--shots=2", "--text=20", "--steps=40", "--batch=8", "--lr=5e-3", "--queries=40"]


def arguments(topic_texts, pretrained, out, *extra):
    return ["--data", topic_texts, "--pretrained", pretrained, "--out", out, *SMALL, *extra]


def run(*args):
    return script.main([str(a) for a in arguments(*args)])


def test_the_task_is_learned_and_picks_are_told_apart(topic_texts, pretrained, tmp_path):
    metrics = run(topic_texts, pretrained, tmp_path, "--attention=both", "--steps=120")
    both = zip(losses(metrics), losses(metrics, "naive"), strict=True)
    assert max([abs(a - b) for a, b in both][:30]) < 5e-6
    assert losses(metrics)[0] > losses(metrics)[-1] + 1.0
    picks = metrics["picks"]
    assert list(picks) == ["none", "random", "similar", "diverse"]
    # four topics: of two at random, one is the query's with probability 7/16
    assert picks["similar"]["answer_shown"] > picks["random"]["answer_shown"] + 0.2
    # 40 queries tell an accuracy to 8 points only; what is put on the right answer they do tell
    gain, error = picks["similar"]["log_probability_over_random"]
    assert gain > max(0.5, 3 * error)
    for how, figures in picks.items():
        accuracy, error = figures["accuracy"]
        n = metrics["queries"]
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (n - 1)))
        gain = accuracy - picks["random"]["accuracy"][0]
        assert figures["accuracy_over_random"][0] == pytest.approx(gain)
        assert figures["log_probability"][0] < 0, how
    assert json.loads((tmp_path / "metrics.json").read_text())["queries"] == 40
    for picture in ("loss.png", "picks.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_resumes_to_the_same_figures(topic_texts, pretrained, tmp_path):
    options = ["--dropout=0.1", "--save-every=3"]
    whole = run(topic_texts, pretrained, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    kill_at_first_checkpoint(
        "select_demonstrations.py",
        arguments(topic_texts, pretrained, out, *options),
        out / "checkpoint.pt",
    )
    assert not (out / "metrics.json").exists()
    resumed = run(topic_texts, pretrained, out, *options, "--resume")
    assert 0 < resumed["resumed_at"] < 40
    assert losses(resumed) == losses(whole)
    assert resumed["picks"] == whole["picks"]


def test_errors(topic_texts, pretrained, tmp_path, capsys):
    def said(*arguments):
        common = ("--data", topic_texts, "--pretrained", pretrained, "--out", tmp_path / "out")
        return error_of(capsys, script.main, *common, *arguments)

    assert "--heads: the size is the pre-trained model's" in said("--heads", 2)
    assert "--text 50 is more than the pre-trained encoder reads: at most 38" in said("--text", 50)
    assert "too few for 600 demonstrations" in said("--text", 20, "--shots", 600)
    assert "no such file or folder" in said("--data", tmp_path / "missing")
    one = tmp_path / "one.txt"
    one.write_text("\n\n".join(f"A text. It is number {i}." for i in range(40)))
    assert "of 1 topics" in said("--text", 20, "--data", one)


# ---- prompts


def examples():
    return [script.Example([10, 11], [50], "a"), script.Example([12], [51, 52], "b")]


def test_a_prompt_asks_for_answers():
    tokens, targets = script.prompt(examples(), every=True)
    cls, sep = pretrain.CLS, pretrain.SEP
    assert tokens == [cls, 10, 11, sep, 50, cls, 12, sep, 51, 52]
    no = IGNORE
    assert targets == [no, no, no, 50, cls, no, no, 51, 52, cls]
    tokens, targets = script.prompt(examples(), every=False)
    assert targets == [no, no, no, no, no, no, no, 51, 52, cls]
    again, only_query = script.prompt([examples()[0], examples()[0]], every=False)
    assert sum(t != IGNORE for t in only_query) == 2 and len(again) == len(only_query)


def test_lessons_hold_no_example_twice_and_few_topics():
    many = [script.Example([i], [90], "abcd"[i % 4]) for i in range(80)]
    lessons = script.Lessons(many, 5)
    generator = torch.Generator().manual_seed(0)
    topics = []
    for _ in range(200):
        chosen = lessons.prompt(generator)
        assert len({e.text[0] for e in chosen}) == 5
        topics.append(len({e.topic for e in chosen}))
    assert {1, 2, 3} <= set(topics) and sum(topics) / 200 < 3.0  # of 5 by chance: 3.05
    few = script.Lessons(many[:3], 3)  # as many as there are: found, not waited for
    assert len(few.prompt(generator)) == 3


def test_asking_scores_the_answer_and_agrees_with_generation(topic_texts, pretrained, tmp_path):
    args = training.parse(script.parser(), ["--pretrained", str(pretrained)])
    pretrained = pretrain.pretrained(args, None)
    torch.manual_seed(0)
    model = script.language_model(args, pretrained, 64, "fused").eval()
    with torch.no_grad():  # away from indifference, so that it has answers of its own
        model.head.weight.mul_(30)
    shown, query = examples()
    prompt = [pretrain.CLS, *shown.text, pretrain.SEP, *shown.answer, pretrain.CLS]
    prompt += [*query.text, pretrain.SEP]
    answer = model.generate(torch.tensor([prompt]), 3, temperature=0)[0, -3:].tolist()

    # the model's own answer, ended where it did not end it: right but for the end
    (right,), (likelihood,) = script.ask(args, model, [[shown, query._replace(answer=answer[:2])]])
    assert bool(right) == (answer[2] == pretrain.CLS)
    tokens = torch.tensor([[*prompt, *answer[:2]]])
    log_p = model(tokens)[0].log_softmax(-1)
    wanted = [*answer[:2], pretrain.CLS]
    places = range(len(prompt) - 1, len(prompt) + 2)
    expected = sum(log_p[place, token].item() for place, token in zip(places, wanted, strict=True))
    assert likelihood.item() == pytest.approx(expected, rel=1e-5)


# ---- the choosing


def circle(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), -1)


def test_most_similar_puts_the_nearest_last():
    pool = circle(90.0, 5.0, 180.0, -10.0, 40.0)
    assert script.most_similar(circle(0.0)[0], pool, 3) == [4, 3, 1]


def test_maximal_marginal_relevance():
    pool = circle(5.0, 6.0, 7.0, -40.0, 180.0)
    query = circle(0.0)[0]
    assert script.maximal_marginal_relevance(query, pool, 2) == [3, 0]  # 6 and 7 repeat 5
    assert script.maximal_marginal_relevance(query, pool, 3, relevance=1.0) == [2, 1, 0]
    for relevance in (0.3, 0.5, 0.8):  # against the formula, spelt out
        vectors = torch.nn.functional.normalize(
            torch.randn(30, 6, generator=torch.Generator().manual_seed(1)), dim=-1
        )
        near, chosen = vectors[0], []
        for _ in range(5):
            scores = {
                i: relevance * (v @ near).item()
                - (1 - relevance) * max([(v @ vectors[j]).item() for j in chosen] or [0.0])
                for i, v in enumerate(vectors)
                if i not in chosen
            }
            chosen.append(max(scores, key=scores.get))
        found = script.maximal_marginal_relevance(near, vectors, 5, relevance)
        assert found == chosen[::-1]


def test_embeddings_do_not_depend_on_the_batch(pretrained):
    args = training.parse(script.parser(), ["--pretrained", str(pretrained)])
    pretrained = pretrain.pretrained(args, None)
    model = pretrain.MaskedLanguageModel(pretrained.config(args, "fused"))
    model.load_state_dict(pretrained.weights)
    both = script.embed(model, examples(), "cpu")
    alone = torch.cat([script.embed(model, [example], "cpu") for example in examples()])
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-6)
    assert script.directions(both, both.mean(0)).norm(dim=-1).tolist() == pytest.approx([1, 1])
