"""What a language model is held against: n-grams with smoothing, and a recurrent network."""

from __future__ import annotations

import torch
from data import DataError
from torch import Tensor, nn


class UnigramModel:
    """How frequent each token is, whatever comes before it; one is added to each count (Laplace):

    P(w) = (c(w) + 1) / (N + V)
    """

    def __init__(self, tokens: Tensor, vocab_size: int):
        """Counts the tokens (N,)."""
        counts = torch.bincount(tokens, minlength=vocab_size).double() + 1.0
        self.p = counts / counts.sum()
        self.parameters = vocab_size

    def log_p(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """log P(target), as `NGramModel.log_p` has it."""
        return self.p.log()[targets]


class NGramModel:
    """Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1998, section 2.7).

    With h the n - 1 tokens before w, and h' all of h but its first:

        P_n(w | h) = (max(c(h w) - D_n, 0) + D_n N(h) P_n-1(w | h')) / c(h)

    c counts what it stands for: at the highest order its occurrences, below that the different
    tokens it follows, since a token that comes after one other only is a poor guess elsewhere. N(h)
    is the number of different tokens that follow h, c(h) the sum of c(h w) over them. The discount
    is D_n = n1 / (n1 + 2 n2), of the numbers of n-grams that c counts once and twice. P_0 is
    uniform; an h that was never seen leaves P_n-1 as it is. Over all w it adds up to 1.

    An n-gram is one number, its tokens the digits of base V; a table is sorted numbers and counts.
    """

    def __init__(self, tokens: Tensor, vocab_size: int, order: int):
        """Counts the tokens (N,). DataError where an n-gram of this order fits no int64."""
        if order < 1 or len(tokens) < order:
            raise DataError(f"n-grams of order {order} need as many tokens, got {len(tokens)}")
        if vocab_size**order >= 2**63:
            raise DataError(f"n-grams of order {order} over {vocab_size} tokens are too many")
        self.vocab_size, self.order = vocab_size, order
        self.tables: list[Table] = []  # of order 1, 2, ...
        grams, counts = torch.unique(self.grams(tokens, order), return_counts=True)
        for n in range(order, 0, -1):
            self.tables.insert(0, Table(grams, counts, vocab_size))
            if n > 1:  # without the first token, and how many first tokens there were
                grams, counts = torch.unique(grams % vocab_size ** (n - 1), return_counts=True)

    def grams(self, tokens: Tensor, n: int) -> Tensor:
        """(..., L) tokens -> (..., L - n + 1), the number of every n-gram in them"""
        length = tokens.shape[-1] - n + 1
        number = torch.zeros_like(tokens[..., :length])
        for i in range(n):
            number = number * self.vocab_size + tokens[..., i : i + length]
        return number

    def log_p(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """log P(target | the inputs up to there), (B, S) float64, of windows (B, S): before a
        target come the inputs of its own window and no others, as in a neural model."""
        rows = torch.cat((inputs, targets[:, -1:]), 1)
        p = torch.full(targets.shape, 1.0 / self.vocab_size, dtype=torch.float64)
        for n, table in enumerate(self.tables, 1):
            # an n-gram ends in the target n - 2; those of one token have no use for the first input
            grams = self.grams(rows[:, 1:] if n == 1 else rows, n)
            ends = p[:, max(0, n - 2) :]
            ends.copy_(table.interpolate(grams, ends))
        return p.log()

    @property
    def parameters(self) -> int:
        """The numbers that were counted."""
        return sum(len(table.grams) for table in self.tables)


class Table:
    """The counts of one order."""

    def __init__(self, grams: Tensor, counts: Tensor, vocab_size: int):
        self.grams, self.counts, self.vocab_size = grams, counts, vocab_size
        once, twice = ((counts == c).sum().item() for c in (1, 2))
        self.discount = once / (once + 2 * twice) if once else 0.0
        self.histories, at, self.followers = torch.unique_consecutive(
            grams // vocab_size, return_inverse=True, return_counts=True
        )
        self.totals = torch.zeros_like(self.followers).index_add_(0, at, counts)

    def interpolate(self, grams: Tensor, lower: Tensor) -> Tensor:
        """P_n of the n-grams, given P_n-1 of them."""
        count = look_up(self.grams, self.counts, grams)
        history = grams // self.vocab_size
        total = look_up(self.histories, self.totals, history)
        followers = look_up(self.histories, self.followers, history)
        kept = (count - self.discount).clamp_min(0.0)
        p = (kept + self.discount * followers * lower) / total
        return torch.where(total > 0, p, lower)


def look_up(keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """The values of the keys asked for, in float64; 0 for those that are not there. Keys ascend."""
    place = torch.searchsorted(keys, asked).clamp_max(len(keys) - 1)
    return torch.where(keys[place] == asked, values[place], 0).double()


class LSTMModel(nn.Module):
    """The recurrent language model (Hochreiter and Schmidhuber 1997; Zaremba et al. 2014,
    arXiv:1409.2329): h_t = LSTM(h_t-1, w_t), P(w_t+1 | w_1 .. w_t) = softmax(h_t W + b).
    """

    def __init__(self, vocab_size: int, width: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)  # on what goes in and what comes out
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) -> logits (B, S, V): those at position t are of the token at t + 1."""
        hidden, _ = self.lstm(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(hidden))


def lstm_of(parameters: int, vocab_size: int, dropout: float = 0.0) -> LSTMModel:
    """The LSTM with about so many parameters, its width a multiple of 16."""

    def count(width: int) -> int:
        return 2 * vocab_size * width + vocab_size + 8 * width * (width + 1)

    width = min(range(16, 4097, 16), key=lambda width: abs(count(width) - parameters))
    return LSTMModel(vocab_size, width, dropout)
