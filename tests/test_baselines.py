"""The baselines of the language model: Kneser-Ney by its definition, probabilities, the LSTM."""

from collections import Counter, defaultdict

import pytest
import torch

pytest.importorskip("rich", reason="the examples need fastattn[examples]")
import examples_common  # noqa: F401, I001

from baselines import LSTMModel, NGramModel, lstm_of
from data import DataError


def text(length, vocab, seed=0):
    """Tokens that repeat each other, so that there is something to count."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(vocab, (8, 6), generator=generator)
    return pool[torch.randint(8, (length // 6 + 1,), generator=generator)].flatten()[:length]


def kneser_ney(tokens, vocab, order):
    """P(w | h) as the formula has it, with dictionaries."""
    tokens = tokens.tolist()
    counts = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])  # each longer n-gram once
    following = {n: defaultdict(dict) for n in counts}
    discounts = {}
    for n, table in counts.items():
        for gram, count in table.items():
            following[n][gram[:-1]][gram[-1]] = count
        once, twice = (sum(c == k for c in table.values()) for k in (1, 2))
        discounts[n] = once / (once + 2 * twice) if once else 0.0

    def p(history, token, n):
        if n == 0:
            return 1 / vocab
        history = tuple(history[len(history) - n + 1 :])
        seen = following[n].get(history)
        lower = p(history[1:], token, n - 1)
        if not seen:
            return lower
        kept = max(seen.get(token, 0) - discounts[n], 0.0)
        return (kept + discounts[n] * len(seen) * lower) / sum(seen.values())

    return lambda history, token: p(history, token, min(order, len(history) + 1))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_its_formula(order):
    tokens, held_out = text(300, 7), text(40, 7, seed=1)
    exact = kneser_ney(tokens, 7, order)
    model = NGramModel(tokens, 7, order)
    rows = held_out.view(4, 10)
    p = model.log_p(rows[:, :-1], rows[:, 1:]).exp()
    for row, line in zip(rows.tolist(), p.tolist(), strict=True):
        expected = [exact(row[:t], row[t]) for t in range(1, 10)]
        assert line == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_add_up_to_one(order):
    """After histories that were seen, seen in part and never seen."""
    vocab = 11
    model = NGramModel(text(400, vocab), vocab, order)
    histories = torch.randint(vocab, (30, 5), generator=torch.Generator().manual_seed(2))
    histories[:10] = text(400, vocab).unfold(0, 5, 1)[:10]
    total = torch.zeros(30, 5, dtype=torch.float64)
    for token in range(vocab):
        targets = torch.cat((histories[:, 1:], torch.full((30, 1), token)), 1)
        total += model.log_p(histories, targets).exp()
        if token == 0:
            assert (model.log_p(histories, targets)[:, -1] > -torch.inf).all()  # smoothed
    assert total[:, -1].tolist() == pytest.approx([1.0] * 30)


def test_longer_histories_tell_more():
    tokens = text(3000, 20)
    rows = text(3000, 20, seed=0)[:600].view(-1, 30)
    losses = [-NGramModel(tokens, 20, n).log_p(rows[:, :-1], rows[:, 1:]).mean() for n in (1, 2, 3)]
    assert losses[0] > losses[1] + 0.5 > losses[2] + 0.5


def test_orders_that_cannot_be_counted():
    with pytest.raises(DataError, match="need as many tokens, got 2"):
        NGramModel(torch.tensor([0, 1]), 4, 3)
    with pytest.raises(DataError, match="order 7 over 1024 tokens are too many"):
        NGramModel(torch.zeros(10, dtype=torch.long), 1024, 7)


def test_the_lstm_is_causal_and_of_the_size_asked_for():
    torch.manual_seed(0)
    model = LSTMModel(13, 16)
    tokens = torch.randint(13, (2, 9))
    logits = model(tokens)
    assert logits.shape == (2, 9, 13)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 13
    moved = (model(changed) - logits).abs().amax((0, 2))
    assert moved[:5].max() == 0 and (moved[5:] > 1e-4).all()
    for parameters in (50_000, 900_000):
        made = sum(p.numel() for p in lstm_of(parameters, 256).parameters())
        assert made == pytest.approx(parameters, rel=0.15)
