"""Pre-training: both tasks are learned, resumed after a kill, and not to be guessed by a trick."""

import json
import random

import pytest
import torch
from examples_common import error_of, kill_at_first_checkpoint, losses, one_thread  # noqa: F401

pytest.importorskip("rich", reason="the examples need fastattn[examples]")
pytest.importorskip("tokenizers", reason="the examples need fastattn[examples]")
pytest.importorskip("matplotlib", reason="the examples need fastattn[examples]")
import data
import pretrain
from bert_texts import TINY, pretrain_tiny

from fastattn.models.transformer import IGNORE

VOCAB = 330


# ---- the script


def test_both_tasks_are_learned_and_fused_and_naive_train_alike(topic_texts, tmp_path):
    metrics = pretrain_tiny(topic_texts, tmp_path, "--attention=both")
    both = zip(losses(metrics), losses(metrics, "naive"), strict=True)
    differences = [abs(a - b) for a, b in both]
    assert len(differences) == 150
    assert max(differences[:30]) < 5e-6  # ten float32 roundings; what follows grows from them
    assert metrics["chance"]["pairs"] == 0.5
    assert metrics["above_chance"]["masked"] > 0.15  # smaller than what was seen, 0.3 and 0.25
    assert metrics["above_chance"]["pairs"] > 0.15
    for run in metrics["runs"].values():
        assert run["masked"] == run["scores"]["masked"][-1]
        assert run["masked_loss"] + run["pairs_loss"] == pytest.approx(
            run["held_out"][-1][1], abs=0.1
        )
    assert json.loads((tmp_path / "metrics.json").read_text())["chance"] == metrics["chance"]
    for picture in ("loss.png", "accuracy.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_resumes_to_the_same_losses(topic_texts, tmp_path):
    options = ["--dropout=0.1", "--steps=30", "--save-every=3"]
    whole = pretrain_tiny(topic_texts, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    common = [*TINY, "--data", topic_texts, "--out", out, "--batch=16", *options]
    kill_at_first_checkpoint("pretrain.py", common, out / "checkpoint.pt")
    assert not (out / "metrics.json").exists()
    resumed = pretrain_tiny(topic_texts, out, *options, "--resume")
    assert 0 < resumed["resumed_at"] < 30
    assert losses(resumed) == losses(whole)
    assert resumed["runs"]["fused"]["scores"] == whole["runs"]["fused"]["scores"]


def test_seeds_reproduce(topic_texts, tmp_path):
    first, again, other = (
        losses(pretrain_tiny(topic_texts, tmp_path / str(i), "--steps=5", f"--seed={seed}"))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


def test_bad_data(topic_texts, tmp_path, capsys):
    def said(*arguments):
        return error_of(capsys, pretrain.main, "--out", tmp_path, *arguments)

    empty = tmp_path / "empty.txt"
    empty.touch()
    one_sentence = tmp_path / "short.txt"
    one_sentence.write_text("\n\n".join(f"Only {i}." for i in range(40)))
    assert "no such file or folder" in said("--data", tmp_path / "missing")
    assert "has no text in it" in said("--data", empty)
    empty.write_text("One passage. Of two sentences.")
    assert "has 1 passages" in said("--data", empty)
    assert "fewer than two passages of two sentences" in said("--data", one_sentence)
    assert "no room for a pair of texts" in said("--data", topic_texts, "--context", 4)
    assert "--vocab 259: at least 260" in said("--data", topic_texts, "--vocab", 259)
    assert "multiple of n_heads" in said("--data", topic_texts, "--heads", 5)


# ---- the puzzle


def test_hidden_tokens_are_15_percent_and_80_10_10():
    tokens = torch.randint(4, VOCAB, (200, 500), generator=torch.Generator().manual_seed(0))
    tokens[:, ::10] = torch.arange(50) % 4  # special tokens among them
    seen, targets = pretrain.mask_tokens(tokens, VOCAB, torch.Generator().manual_seed(1))
    chosen = targets != IGNORE
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(seen[~chosen], tokens[~chosen])
    assert not chosen[:, ::10].any()
    ordinary = tokens >= 4
    assert chosen[ordinary].float().mean() == pytest.approx(0.15, abs=0.005)
    hidden, before = seen[chosen], tokens[chosen]
    assert (hidden == pretrain.MASK).float().mean() == pytest.approx(0.8, abs=0.015)
    assert (hidden == before).float().mean() == pytest.approx(0.1, abs=0.01)
    replaced = hidden[(hidden != pretrain.MASK) & (hidden != before)]
    assert len(replaced) / len(hidden) == pytest.approx(0.1, abs=0.01)
    assert replaced.min() >= 4 and replaced.max() < VOCAB
    again = pretrain.mask_tokens(tokens, VOCAB, torch.Generator().manual_seed(1))
    assert torch.equal(seen, again[0])


def uneven_pairs():
    """Long texts follow long ones: their lengths would tell, were wrong ones drawn from anywhere."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 30) for _ in range(2000)]
    return pretrain.Pairs(
        [pretrain.Pair([9] * n, [9] * n, i) for i, n in enumerate(lengths)], VOCAB
    )


def test_wrong_texts_are_of_other_passages_and_as_long_as_the_right_ones():
    pairs = uneven_pairs()
    generator = torch.Generator().manual_seed(0)
    wrong = [pairs.wrong_second(i, generator) for i in range(len(pairs))]
    off = [len(w) - len(pair.second) for w, pair in zip(wrong, pairs.pairs, strict=True)]
    assert max(map(abs, off)) <= 2
    assert abs(sum(off) / len(off)) < 0.05

    same = pretrain.Pairs([pretrain.Pair([5], [i], i // 2) for i in range(40)], VOCAB)
    for i in range(40):
        for _ in range(5):
            assert same.wrong_second(i, generator)[0] // 2 != i // 2


def test_batches_are_what_their_names_say():
    pairs = pretrain.Pairs([pretrain.Pair([10 + i], [60 + i, 60 + i], i) for i in range(50)], VOCAB)
    batch = pairs.random_batch(0, 3, 20)
    restored = torch.where(batch.targets == IGNORE, batch.tokens, batch.targets)
    for row, follows in zip(restored.tolist(), batch.follows.tolist(), strict=True):
        assert (row[0], row[2], row[5]) == (pretrain.CLS, pretrain.SEP, pretrain.SEP)
        assert (row[3] - 60 == row[1] - 10) == follows
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1]] * 20
    assert batch.mask.all()
    assert 0 < batch.follows.sum() < 20
    assert torch.equal(pairs.random_batch(0, 3, 20).tokens, batch.tokens)
    assert not torch.equal(pairs.random_batch(0, 4, 20).tokens, batch.tokens)
    held_out = pairs.even_batches(10, 4)
    assert sum(len(b.follows) for b in held_out) == 20
    assert sum(int(b.follows.sum()) for b in held_out) == 10


def test_a_pair_is_the_text_on_both_sides_of_a_cut():
    class Letters:
        def encode(self, text):
            return torch.tensor(list(text))

    passage = data.Passage("a", ("ab", "cd", "ef"))
    pairs = pretrain.make_pairs([passage], Letters(), half=3)
    as_text = [(bytes(p.first).decode(), bytes(p.second).decode()) for p in pairs]
    assert as_text == [("ab", "cde"), ("bcd", "ef")]


# ---- the texts


def test_passages_of_a_folder_and_of_a_file(tmp_path):
    (tmp_path / "sea").mkdir()
    (tmp_path / "sea" / "a.txt").write_text("The sea\nis wide. It is\tdeep.\n\n\nA gull cried!\n\n")
    (tmp_path / "land.txt").write_text("A hill (3.5 m high). e.g. this.\n \nA gull cried!")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "picture").write_bytes(b"\0\1")
    found = data.passages(tmp_path)
    assert found == (
        data.Passage("land", ("A hill (3.5 m high). e.g. this.",)),
        data.Passage("land", ("A gull cried!",)),
        data.Passage("sea", ("The sea is wide.", "It is deep.")),
    )
    assert data.passages(tmp_path / "land.txt") == found[:2]


def test_passages_of_the_standard_library(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    file = tmp_path / "zoo" / "cage.py"
    file.write_text('"""A cage.\n\nIt is shut. It\nlocks."""\ndef f():\n    "Opens it"\n')
    monkeypatch.setattr(data, "standard_library", lambda: (tmp_path, [file]))
    data.passages.cache_clear()
    try:
        assert data.passages(None) == (
            data.Passage("zoo", ("A cage.", "It is shut.", "It locks.")),
            data.Passage("zoo", ("Opens it",)),
        )
    finally:
        data.passages.cache_clear()


def test_a_saved_tokenizer_is_the_same():
    text = b"words and words and more words, [PAD] too"
    tokenizer = data.BPETokenizer.train(text, 300, pretrain.SPECIAL)
    loaded = data.BPETokenizer.from_json(tokenizer.to_json())
    assert torch.equal(loaded.encode(text), tokenizer.encode(text))
    assert loaded.encode(text).min() >= len(pretrain.SPECIAL)
