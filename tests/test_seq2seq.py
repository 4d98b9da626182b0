"""Translation and summarisation: they learn, resume after a kill, and padding changes nothing."""

import json
import math

import pytest
import torch

pytest.importorskip("rich", reason="the examples need fastattn[examples]")
pytest.importorskip("matplotlib", reason="the examples need fastattn[examples]")
pytest.importorskip("tokenizers", reason="the examples need fastattn[examples]")
from examples_common import error_of, kill_at_first_checkpoint, losses, one_thread  # noqa: F401

# isort: split
import data
import seq2seq
import summarise
import training
import translate

from fastattn.models import cross_entropy
from fastattn.models.transformer import IGNORE

TINY = ["--steps=40", "--batch=8", "--lr=5e-3", "--dropout=0", "--vocab=320", "--held-out=20"]
TINY += ["--d-model=32", "--layers=1", "--heads=2", "--longest-source=24", "--longest-target=24"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPANISH = ["cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sums of digits in English and Spanish, sources of unequal length."""
    lines = []
    for i in range(0, 1000, 3):
        digits = [int(d) for d in str(i)]
        english, spanish = (
            joined.join(words[d] for d in digits)
            for joined, words in ((" and ", ENGLISH), (" y ", SPANISH))
        )
        lines.append(f"{english}\t{spanish}\n")
    path = tmp_path_factory.mktemp("pairs") / "sums.tsv"
    path.write_text("".join(lines))
    return path


def run(script, pairs, out, *extra):
    return script.main([*TINY, "--data", str(pairs), "--out", str(out), *extra])


def parsed(*arguments):
    return training.parse(translate.parser(), [*TINY, *arguments])


# ------------------------------------------------------------------------------- the scripts


def test_translation_learns_and_fused_and_naive_train_alike(pairs, tmp_path):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "out"
    metrics = run(translate, pairs, out, "--attention=both", "--steps=120")
    differences = [
        abs(a - b) for a, b in zip(losses(metrics), losses(metrics, "naive"), strict=True)
    ]
    assert len(differences) == 120
    assert metrics["loss_difference_max"] == max(differences) < 5e-6
    assert losses(metrics)[-1] < losses(metrics)[0] - 3.0
    copied = metrics["baselines"]["the source, copied"]["BLEU"]
    for one in metrics["runs"].values():
        assert 100 >= one["greedy"]["BLEU"] > copied + 20
        assert 100 >= one["beam"]["BLEU"] > copied + 20
        assert math.exp(one["held_out"][-1][1]) == one["perplexity"]
    assert json.loads((out / "metrics.json").read_text())["samples"] == metrics["samples"]
    assert list(metrics["samples"][0]) == ["source", "target", "greedy", "beam"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.partial"))


def test_a_killed_translation_resumes_to_the_same_losses(pairs, tmp_path):
    """With dropout, so that the random state counts too."""
    pytest.importorskip("sacrebleu")
    options = ["--dropout=0.1", "--save-every=3"]
    whole = run(translate, pairs, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    command = [*TINY, "--data", pairs, "--out", out, *options]
    kill_at_first_checkpoint("translate.py", command, out / "checkpoint.pt")
    assert not (out / "metrics.json").exists()
    resumed = run(translate, pairs, out, *options, "--resume")
    assert 0 < resumed["resumed_at"] < 40
    assert losses(resumed) == losses(whole)
    assert resumed["samples"] == whole["samples"]
    for figure in ("held_out", "greedy", "beam"):
        assert resumed["runs"]["fused"][figure] == whole["runs"]["fused"][figure]


def test_summaries_of_texts_cut_to_length(pairs, tmp_path):
    pytest.importorskip("rouge_score")
    long = tmp_path / "long.tsv"
    long.write_text(pairs.read_text().replace("\t", " and so on and on and on and on\t"))
    out = tmp_path / "out"
    metrics = run(summarise, long, out, "--longest-source=9", "--dtype=bfloat16")
    assert metrics["pairs"]["held_out"] == 20
    assert losses(metrics)[-1] < losses(metrics)[0] - 1.0
    for figures in (*metrics["baselines"].values(), metrics["runs"]["fused"]["beam"]):
        assert list(figures) == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
        assert all(0 <= value <= 100 for value in figures.values())

    again = run(
        summarise, long, out, "--longest-source=9", "--dtype=bfloat16", "--resume", "--beams=1"
    )
    assert again["resumed_at"] == 40 and losses(again) == losses(metrics)
    assert again["runs"]["fused"]["beam"] == again["runs"]["fused"]["greedy"]


def test_refusals(pairs, tmp_path, capsys):
    pytest.importorskip("sacrebleu")

    def refused(*arguments):
        return error_of(capsys, translate.main, *TINY, "--out", tmp_path / "out", *arguments)

    bad = tmp_path / "bad.tsv"
    assert "there is no such file" in refused("--data", tmp_path / "missing.tsv")
    bad.write_text("\n \n")
    assert "has no pairs" in refused("--data", bad)
    bad.write_text("one\tuno\ntwo dos\n")
    assert "line 2: expected a source, a tab and a target, got 0 tabs" in refused("--data", bad)
    bad.write_bytes(b"\x89PNG\0")
    assert "is no UTF-8 text" in refused("--data", bad)
    assert "Is a directory" in refused("--data", tmp_path)
    bad.write_text("one\tuno\n" * 100)
    assert "1 pairs are too few to hold 20 out" in refused("--data", bad)
    assert "no pair fits" in refused("--data", pairs, "--longest-source", 1)
    assert "must be in [0, 1)" in refused("--data", pairs, "--label-smoothing", 1)
    assert "multiple of n_heads" in refused("--data", pairs, "--heads", 5)
    pytest.importorskip("polib")
    assert "not installed; try `pip install nowhere`" in refused("--package", "nowhere")
    assert "pip install nowhere.at.all" in refused("--package", "nowhere.at.all")
    assert "has no translation catalogues" in refused("--package", "json")


# --------------------------------------------------------------------------- batches and loss


def tiny_model(attention, args):
    torch.manual_seed(0)
    return seq2seq.encoder_decoder(args, 50, attention)


PAIRS = [
    seq2seq.TokenPair(list(range(3, 3 + source)), list(range(20, 20 + target)))
    for source, target in ((1, 4), (9, 1), (5, 7), (17, 2))
]


def gradients(model, args, batch):
    model.zero_grad()
    loss, count = seq2seq.teacher_forcing(args)(model, batch)
    loss.backward()
    return loss.item(), count, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_fused_is_naive_with_padding_in_loss_and_gradients():
    args = parsed("--layers=2")
    batch = seq2seq.make_batch(PAIRS)
    assert not batch.source_mask.all() and not batch.inputs_mask.all()
    fused, naive = (
        gradients(tiny_model(kind, args).double(), args, batch) for kind in ("fused", "naive")
    )
    assert fused[0] == pytest.approx(naive[0], rel=1e-12)
    for name, gradient in naive[2].items():
        torch.testing.assert_close(fused[2][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("attention", ["fused", "naive"])
def test_padding_changes_neither_loss_nor_gradients(attention):
    """What a batch gives is the mean over its pairs, each alone and without padding."""
    args = parsed("--layers=2")
    model = tiny_model(attention, args).double()
    loss, count, gradient = gradients(model, args, seq2seq.make_batch(PAIRS))
    alone = [gradients(model, args, seq2seq.make_batch([pair])) for pair in PAIRS]
    assert count == sum(c for _, c, _ in alone) == sum(len(p.target) + 1 for p in PAIRS)
    assert loss == pytest.approx(sum(x * c for x, c, _ in alone) / count, rel=1e-12)
    for name in gradient:
        mean = sum(g[name] * c for _, c, g in alone) / count
        torch.testing.assert_close(gradient[name], mean, rtol=1e-9, atol=1e-12, msg=name)


def test_outputs_are_those_of_each_source_alone():
    args = parsed()
    model = tiny_model("fused", args)
    tokenizer = data.BPETokenizer.train(b"any text " * 10, 300, seq2seq.SPECIAL_TOKENS)
    model.head.weight = torch.nn.Parameter(torch.randn_like(model.head.weight))  # says any token
    sources = [pair.source for pair in PAIRS]
    for decoding in ({}, {"num_beams": 3}):
        together = seq2seq.outputs(args, model, tokenizer, sources, **decoding)
        alone = [seq2seq.outputs(args, model, tokenizer, [s], **decoding)[0] for s in sources]
        assert together == alone
        assert len(set(alone)) > 1
    one = seq2seq.outputs(args, model, tokenizer, sources, num_beams=1, length_penalty=0.5)
    assert one == seq2seq.outputs(args, model, tokenizer, sources)


def test_label_smoothing_is_its_definition():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    targets = torch.tensor([[1, 6, IGNORE], [0, IGNORE, IGNORE]])
    e, total = 0.1, 0.0
    for b, s in ((0, 0), (0, 1), (1, 0)):
        log_p = logits[b, s] - logits[b, s].exp().sum().log()
        wanted = torch.full((7,), e / 7, dtype=torch.float64)
        wanted[targets[b, s]] += 1 - e
        total -= (wanted * log_p).sum() / 3
    assert cross_entropy(logits, targets, label_smoothing=e).item() == pytest.approx(total.item())
    args = parsed("--label-smoothing=0.1")
    loss, model = seq2seq.teacher_forcing(args), tiny_model("fused", args)
    batch = seq2seq.make_batch(PAIRS)
    smoothed = loss(model, batch)[0].item()
    plain = loss(model.eval(), batch)[0].item()  # held-out figures are not smoothed
    logits = model(batch.source, batch.inputs, batch.source_mask, batch.inputs_mask)
    assert plain == pytest.approx(cross_entropy(logits, batch.following).item())
    assert smoothed != plain


def test_batches():
    batch = seq2seq.make_batch([seq2seq.TokenPair([5, 6], [7]), seq2seq.TokenPair([8], [9, 10])])
    pad, start, stop = seq2seq.PAD, seq2seq.START, seq2seq.STOP
    assert batch.source.tolist() == [[5, 6, stop], [8, stop, pad]]
    assert batch.source_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.inputs.tolist() == [[start, 7, pad], [start, 9, 10]]
    assert batch.inputs_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.following.tolist() == [[7, stop, IGNORE], [9, 10, stop]]

    pairs = [seq2seq.TokenPair([i], [5] * (i % 13)) for i in range(3, 203)]
    size = 5
    steps = [seq2seq.random_batch(pairs, 0, step, size) for step in range(200 // size)]
    seen = [i for batch in steps for i in batch.source[:, 0].tolist()]
    assert sorted(seen) == list(range(3, 203))  # an epoch has each pair once
    padding = 1 - sum(b.inputs_mask.sum() for b in steps) / sum(b.inputs.numel() for b in steps)
    assert padding < 0.12  # in a random order, about half
    again = seq2seq.random_batch(pairs, 0, 7, size)
    assert torch.equal(again.source, steps[7].source)
    assert not torch.equal(seq2seq.random_batch(pairs, 1, 7, size).source, steps[7].source)


def test_a_corpus_keeps_the_held_out_apart(pairs, tmp_path):
    args = parsed("--out", str(tmp_path), "--longest-target", "14")
    corpus = seq2seq.make_corpus(args, data.read_pairs(pairs))
    assert not {p.source for p in corpus.training} & {p.source for p in corpus.held_out}
    for texts, tokens in (
        (corpus.training, corpus.training_tokens),
        (corpus.held_out, corpus.held_out_tokens),
    ):
        assert len(texts) == len(tokens)
        for text, token in zip(texts, tokens, strict=True):
            assert corpus.tokenizer.decode(torch.tensor(token.source)) == text.source
            assert corpus.tokenizer.decode(torch.tensor(token.target)) == text.target
            assert len(token.target) <= 14
            assert min(token.source + token.target) > seq2seq.STOP


def test_what_is_to_train_on_alone_is_never_held_out(pairs, tmp_path):
    args = parsed("--out", str(tmp_path))
    every = data.read_pairs(pairs)
    before = seq2seq.make_corpus(args, every)
    asked = before.held_out[0].source
    more = [data.Pair("ten", "diez"), data.Pair(f"{asked.upper()}!", "known before it is asked")]
    after = seq2seq.make_corpus(args, every, training_only=more)
    assert after.held_out == before.held_out
    assert after.training == [*before.training, more[0]]


def test_docstrings_and_what_they_document(tmp_path, monkeypatch):
    file = tmp_path / "cage.py"
    file.write_text(
        '''"""A cage for lions.

It is shut and it locks
by itself."""
if True:
    class BigHTTPCage2:
        def openDoor(self, with_key, /, how=None, *, slowly=False):
            "Open the door"
        async def shut(self):
            """This first line goes
            on in the second one, and is no summary."""
'''
    )
    monkeypatch.setattr(data, "standard_library", lambda: (tmp_path, [file]))
    texts, names = summarise.docstring_pairs()
    assert texts == [("cage It is shut and it locks by itself.", "A cage for lions.")]
    signature = "big http cage 2 open door (with key, how, slowly)"
    assert names == [(signature, "Open the door")]


# --------------------------------------------------------------------------------- the figures


def test_bleu_of_known_texts():
    pytest.importorskip("sacrebleu")
    reference = "the cat sat on the red mat"
    assert translate.bleu([reference], [reference])["BLEU"] == pytest.approx(100)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; one word too short
    precision = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    expected = 100 * math.exp(1 - 7 / 6) * precision
    shorter = translate.bleu(["the cat sat on a mat"], [reference])["BLEU"]
    assert shorter == pytest.approx(expected)
    corpus = translate.bleu(["the cat sat on a mat", "x y z"], [reference, "a b c"])["BLEU"]
    assert 0 < corpus < shorter


def test_rouge_of_known_texts():
    pytest.importorskip("rouge_score")
    scores = summarise.rouge(["the cat sat down"], ["The cat was sat on the mat."])
    # words in common: the, cat, sat of 4 and 7; pairs: the cat of 3 and 6; in order: the cat sat
    assert scores["ROUGE-1"] == pytest.approx(100 * 2 * 3 / (4 + 7))
    assert scores["ROUGE-2"] == pytest.approx(100 * 2 * 1 / (3 + 6))
    assert scores["ROUGE-L"] == pytest.approx(100 * 2 * 3 / (4 + 7))
    mean = summarise.rouge(["a b", "c"], ["b a", "d"])
    assert mean == pytest.approx({"ROUGE-1": 50, "ROUGE-2": 0, "ROUGE-L": 25})


def test_baselines(tmp_path):
    lines = [data.Pair(f"{a} {b} file", f"{b} {a}") for a in ENGLISH for b in ENGLISH]
    corpus = seq2seq.make_corpus(parsed("--out", str(tmp_path)), lines)
    known = {pair.target: pair.source for pair in corpus.training}
    for pair, nearest in zip(corpus.held_out, translate.nearest_translations(corpus), strict=True):
        words = set(pair.source.split()) - {"file"}
        assert words & set(known[nearest].split())
    assert summarise.leads(corpus) == [" ".join(p.source.split()[:2]) for p in corpus.held_out]
    drawn = summarise.any_summaries(corpus)
    assert set(drawn) <= set(known) and len(set(drawn)) > 5
