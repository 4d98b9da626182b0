"""From a model that says how likely each next token is to text: sampling and beam search.

Reading order: what can be asked for (`Decoding`), the next token of one sequence (`Sampler`,
`sample`), the best of several (`beam_search`), checks.

Shapes: B batch, P length of the prompt, K beams, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastattn.models.transformer import KVCache, TransformerConfig

    Cache = list[tuple[KVCache, KVCache]]  # of each layer, self- and cross-attention's

# next_logits(tokens, length): the logits (rows, V) of what follows the first `length` tokens, of
# which `tokens` (rows, n) are those that no cache holds yet
NextLogits = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Decoding:
    """How a prompt goes on. Every field is checked; a bad one raises ValueError.

    Greedy with do_sample=False or temperature=0, the most likely token each time; with num_beams
    above 1 a beam search for the most likely sequence, see `beam_search`; otherwise a draw, see
    `Sampler`, for which a `seed` gives the same tokens each time.

    A sequence that makes one of `stop_tokens` repeats it from there on, and when all have,
    generation ends. `stream` is called with the new tokens (B,) as soon as there are any, those of
    stopped sequences included. `use_cache=False` runs the whole sequence again for each token:
    slow, and the same.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    stop_tokens: Iterable[int] = ()
    use_cache: bool = True
    stream: Callable[[Tensor], object] | None = None

    def __post_init__(self) -> None:
        temperature, k, p = self.temperature, self.top_k, self.top_p
        if not isinstance(temperature, (int, float)) or not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature!r}")
        if k is not None and (not isinstance(k, int) or k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, got {k!r}")
        if p is not None and (not isinstance(p, (int, float)) or not 0.0 < p <= 1.0):
            raise ValueError(f"top_p must be in (0, 1], got {p!r}")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed must be None or an integer, got {self.seed!r}")
        if not isinstance(self.num_beams, int) or self.num_beams < 1:
            raise ValueError(f"num_beams must be an integer of at least 1, got {self.num_beams!r}")
        penalty = self.length_penalty
        if not isinstance(penalty, (int, float)) or not math.isfinite(penalty):
            raise ValueError(f"length_penalty must be a finite number, got {penalty!r}")
        if self.num_beams > 1:
            sampling = {"top_k": k, "top_p": p, "seed": self.seed}
            named = [name for name, value in sampling.items() if value is not None]
            if temperature not in (0.0, 1.0):
                named.append("temperature")
            if named:
                raise ValueError(f"a beam search draws nothing: num_beams > 1 with {named[0]}")
            if self.stream is not None:
                raise ValueError("a beam search knows its tokens at the end only: no stream")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0.0

    def stops(self, like: Tensor) -> Tensor:
        return torch.tensor(list(self.stop_tokens), dtype=like.dtype, device=like.device)


def decode(
    next_logits: NextLogits,
    prompt: Tensor,
    max_new_tokens: int,
    decoding: Decoding,
    softmax: Callable[..., Tensor],
    cache: Cache | None,
) -> Tensor:
    """The prompt (B, P) and up to max_new_tokens more, as `decoding` asks for."""
    if decoding.num_beams > 1:
        return beam_search(next_logits, prompt, max_new_tokens, decoding, cache)
    return sample(next_logits, prompt, max_new_tokens, decoding, softmax)


# ------------------------------------------------------------------------------- token by token


class Sampler:
    """Chooses the next token from its logits (B, V).

    Greedy: the most likely one. Otherwise a draw from softmax(logits / temperature), kept to the
    `top_k` most likely tokens (Fan et al. 2018), then to the smallest set of them that holds at
    least `top_p` of the probability (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
    """

    def __init__(
        self,
        decoding: Decoding,
        softmax: Callable[..., Tensor] = torch.softmax,
        device: torch.device | str = "cpu",
    ):
        self.decoding, self.softmax = decoding, softmax
        self.generator: torch.Generator | None = None
        if decoding.seed is not None:
            self.generator = torch.Generator(device).manual_seed(decoding.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,)"""
        asked = self.decoding
        if asked.greedy:
            return logits.argmax(-1)
        kept = min(asked.top_k or logits.shape[-1], logits.shape[-1])
        logits, tokens = logits.float().topk(kept)  # most likely first
        # the maximum goes before the division, so that a tiny temperature cannot overflow
        p = self.softmax((logits - logits[:, :1]) / asked.temperature, -1)
        if asked.top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= asked.top_p, 0.0)  # multinomial renormalises
        choice = torch.multinomial(p, 1, generator=self.generator)
        return tokens.gather(-1, choice)[:, 0]


def sample(
    next_logits: NextLogits,
    prompt: Tensor,
    max_new_tokens: int,
    decoding: Decoding,
    softmax: Callable[..., Tensor],
) -> Tensor:
    """Add one chosen token after the other to the prompt (B, P)."""
    batch, prompted = prompt.shape
    choose = Sampler(decoding, softmax, prompt.device)
    output = prompt.new_empty(batch, prompted + max_new_tokens)
    output[:, :prompted] = prompt
    stops = decoding.stops(prompt)
    stopped = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    fed = 0
    for length in range(prompted, prompted + max_new_tokens):
        chosen = choose(next_logits(output[:, fed:length], length))
        output[:, length] = torch.where(stopped, output[:, length - 1], chosen)
        fed = length if decoding.use_cache else 0
        if decoding.stream is not None:
            decoding.stream(output[:, length].clone())
        if stops.numel():
            stopped |= torch.isin(output[:, length], stops)
            if stopped.all():
                return output[:, : length + 1]
    return output


# ---------------------------------------------------------------------------------- beam search


def beam_search(
    next_logits: NextLogits,
    prompt: Tensor,
    max_new_tokens: int,
    decoding: Decoding,
    cache: Cache | None,
) -> Tensor:
    """The best continuation y of each prompt (B, P) that K = num_beams hypotheses lead to, by

        score(y) = log P(y | prompt) / |y|^length_penalty

    (Wu et al. 2016, arXiv:1609.08144, with the plain length; at 0 the probability alone counts,
    which favours short sequences, at 1 it is the mean over the tokens, the stop token included).

    In each step every hypothesis goes on with every token, and the K most likely results stay.
    Those of them that end in a stop token are set aside and their places filled by the next. A
    prompt is done when K have been set aside; at max_new_tokens those unfinished count as well.
    """
    batch, prompted = prompt.shape
    beams, total = decoding.num_beams, prompted + max_new_tokens
    stops = decoding.stops(prompt)
    row = torch.arange(batch, device=prompt.device)
    output = prompt.new_empty(batch, beams, total)
    output[:, :, :prompted] = prompt[:, None]
    log_p = torch.full((batch, beams), -math.inf, device=prompt.device)
    log_p[:, 0] = 0.0  # all hypotheses are the prompt: one of them goes on, the others would repeat
    best = prompt.new_empty(batch, total)
    best_score = log_p.new_full((batch,), -math.inf)
    best_length = torch.full((batch,), prompted, device=prompt.device)
    set_aside = torch.zeros(batch, dtype=torch.long, device=prompt.device)
    done = torch.zeros(batch, dtype=torch.bool, device=prompt.device)

    def offer(score: Tensor, beam: Tensor, token: Tensor | None, length: int) -> None:
        """Keep what beats the best: for each prompt the first tokens of a beam, and one more."""
        better = score > best_score
        best[better] = output[better, beam[better]]
        if token is not None:  # repeated to the end
            best[better, length - 1 :] = token[better, None]
        best_score[better], best_length[better] = score[better], length

    fed = 0
    for length in range(prompted, total):
        if length == prompted:  # the prompt runs once, not once for each beam
            logits = next_logits(prompt, length)
            copies = row.repeat_interleave(beams)
            logits = logits[copies]
            select_rows(cache, copies)
        else:
            logits = next_logits(output[:, :, fed:length].flatten(0, 1), length)
        fed = length if decoding.use_cache else 0
        vocabulary = logits.shape[-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        following = logits.log_softmax(-1).unflatten(0, (batch, beams))  # (B, K, V)
        # of these at least K do not stop
        most = min(beams * (1 + len(stops)), beams * vocabulary)
        candidates, index = (log_p[:, :, None] + following).flatten(1).topk(most)
        beam, token = index // vocabulary, index % vocabulary  # (B, most), the most likely first
        ends = torch.isin(token, stops)

        counts = ends[:, :beams] & ~candidates[:, :beams].isneginf() & ~done[:, None]
        set_aside += counts.sum(1)
        score, place = candidates[:, :beams].masked_fill(~counts, -math.inf).max(1)
        made = length + 1 - prompted
        score = score / made**decoding.length_penalty
        offer(score, beam[row, place], token[row, place], length + 1)

        going_on = ends.long().argsort(dim=1, stable=True)[:, :beams]
        log_p = candidates.masked_fill(ends, -math.inf).gather(1, going_on)
        beam, token = beam.gather(1, going_on), token.gather(1, going_on)
        output[:, :, :length] = output[row[:, None], beam, :length]
        output[:, :, length] = token
        done |= (set_aside >= beams) | log_p.isneginf().all(1)
        if done.all():
            break
        select_rows(cache, (row[:, None] * beams + beam).flatten())
    unfinished = log_p[:, 0] / max(1, max_new_tokens) ** decoding.length_penalty
    first = torch.zeros_like(row)
    offer(unfinished.masked_fill(done, -math.inf), first, None, total)
    return best[:, : int(best_length.max())]


def select_rows(cache: Cache | None, rows: Tensor) -> None:
    """Make the cache that of these rows of the batch. What the cross-attention holds is the same
    for all hypotheses of a source, so it changes with the number of rows alone.
    """
    for own, cross in cache or ():
        own.select(rows)
        if cross.keys is not None and len(cross.keys) != len(rows):
            cross.select(rows)


# --------------------------------------------------------------------------------------- checks


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while, and back on if it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """(B, ...) -> (rows, ...), each row as often as there are beams."""
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), 0)


def check_ids(name: str, tokens: Tensor, config: TransformerConfig) -> None:
    """Reads every id, so it is for once a generation, not once a step."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise ValueError(
            f"{name} must be in [0, {config.vocab_size}), "
            f"got ids from {int(tokens.min())} to {int(tokens.max())}"
        )


def check_length(prompt: Tensor, max_new_tokens: int, config: TransformerConfig) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    if prompt.shape[1] + max_new_tokens > config.max_len:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and max_new_tokens={max_new_tokens} are "
            f"more than max_len {config.max_len}"
        )
