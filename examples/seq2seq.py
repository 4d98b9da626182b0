"""What translation and summarisation share: an encoder-decoder that learns from pairs of texts.

Reading order: the command line, pairs as tokens (`Corpus`), batches, the loss, what a trained model
makes of new sources, and `learn`, the whole way from pairs to figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from data import (
    BPETokenizer,
    DataError,
    Pair,
    clean,
    fingerprint,
    normalised,
    pad,
    random_rows,
    split_pairs,
    step_generator,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from training import (
    arguments,
    build_runs,
    compare,
    computing,
    finite,
    fit,
    fraction,
    natural,
    plot_losses,
    positive,
    show_comparison,
    transformer_config,
)

from fastattn.models import EncoderDecoder, cross_entropy
from fastattn.models.transformer import IGNORE

SPECIAL_TOKENS = ("[PAD]", "[START]", "[STOP]")
PAD, START, STOP = range(3)

# figures of outputs against references, in percent: {"BLEU": 21.3}
Score = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


OF_SCORING = {"beams", "length_penalty", "samples"}  # may change after the training, with --resume


def pair_arguments(description: str, task: str, **defaults: Any) -> argparse.ArgumentParser:
    """The command line of a script that learns from pairs."""
    what = "a text file of pairs, one a line: source, tab, target"
    parser = arguments(description, task, data_help=what, **defaults)
    add = parser.add_argument
    add("--vocab", type=positive, default=2000, help="BPE tokens, shared by both sides [2000]")
    add("--longest-source", type=positive, help="in tokens [%(default)s]")
    add("--longest-target", type=positive, help="in tokens [%(default)s]")
    add("--label-smoothing", type=fraction, default=0.1, help="[0.1]")
    add("--beams", type=positive, default=4, help="of the beam search [4]")
    add("--length-penalty", type=finite, default=1.0, help="of the beam search [1]")
    add("--held-out", type=positive, default=400, help="pairs held out, about [400]")
    add("--samples", type=natural, default=6, help="held-out pairs to show [6]")
    return parser


# ------------------------------------------------------------------------------- pairs as tokens


class Corpus(NamedTuple):
    """Pairs, split, and what they are in tokens."""

    tokenizer: BPETokenizer
    training: list[Pair]
    held_out: list[Pair]
    training_tokens: list[TokenPair]
    held_out_tokens: list[TokenPair]


class TokenPair(NamedTuple):
    source: list[int]
    target: list[int]  # without START and STOP


def make_corpus(
    args: argparse.Namespace,
    pairs: Sequence[Pair],
    truncate: bool = False,
    training_only: Sequence[Pair] = (),
) -> Corpus:
    """Split the pairs, train a tokenizer on those to train on, encode all. A source that is longer
    than --longest-source is cut there with `truncate`, else its pair is left out, as is one whose
    target is longer than --longest-target.
    """
    if len(pairs) < 2 * args.held_out:
        raise DataError(
            f"{len(pairs)} pairs are too few to hold {args.held_out} out: "
            "give more of them or a smaller --held-out"
        )
    training, held_out = split_pairs(pairs, args.held_out / len(pairs))
    held_out_sources = {normalised(pair.source) for pair in held_out}
    training += [p for p in training_only if normalised(p.source) not in held_out_sources]
    sides = training, held_out
    text = "\n".join(f"{pair.source}\n{pair.target}" for pair in training)
    tokenizer = BPETokenizer.train(text.encode(), args.vocab, SPECIAL_TOKENS)
    kept: list[tuple[list[Pair], list[TokenPair]]] = []
    for side in sides:
        fitting = []
        for pair in side:
            source, target = (tokenizer.encode(text.encode()).tolist() for text in pair)
            if truncate:
                source = source[: args.longest_source]
            if len(source) <= args.longest_source and len(target) <= args.longest_target:
                fitting.append((pair, TokenPair(source, target)))
        if not fitting:
            raise DataError(
                f"no pair fits into --longest-source {args.longest_source} and "
                f"--longest-target {args.longest_target} tokens"
            )
        texts, tokens = zip(*fitting, strict=True)
        kept.append((list(texts), list(tokens)))
    (training_texts, training_tokens), (held_out_texts, held_out_tokens) = kept
    return Corpus(tokenizer, training_texts, held_out_texts, training_tokens, held_out_tokens)


# ------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Sources and targets of unequal length, padded on the right; a mask is True at real tokens."""

    source: Tensor  # (B, M)
    source_mask: Tensor  # (B, M)
    inputs: Tensor  # (B, S), what the decoder is given: START and the target
    inputs_mask: Tensor  # (B, S)
    following: Tensor  # (B, S), what it is to say: the target and STOP, then IGNORE


def make_batch(pairs: Sequence[TokenPair]) -> Batch:
    source, source_mask = pad([[*pair.source, STOP] for pair in pairs], PAD)
    inputs, inputs_mask = pad([[START, *pair.target] for pair in pairs], PAD)
    following, _ = pad([[*pair.target, STOP] for pair in pairs], IGNORE)
    return Batch(source, source_mask, inputs, inputs_mask, following)


POOL = 8  # batches that are dealt out together
SCORED_TOGETHER = 64  # pairs
SHOWN = 300  # characters of a sample


def random_batch(pairs: Sequence[TokenPair], seed: int, step: int, batch: int) -> Batch:
    """The batch of a step. Its pairs are of about one length, which saves padding: the pairs of a
    pool of batches are dealt out in the order of their length, the batches in a random one.
    """
    pool, place = divmod(step, POOL)
    rows = random_rows(len(pairs), seed, pool, POOL * batch)
    rows.sort(key=lambda row: sum(map(len, pairs[row])))
    place = int(torch.randperm(POOL, generator=step_generator(seed, pool))[place])
    return make_batch([pairs[row] for row in rows[place * batch : (place + 1) * batch]])


def even_batches(pairs: Sequence[TokenPair]) -> list[Batch]:
    """All pairs, once, those of about one length together."""
    ordered = sorted(pairs, key=lambda pair: sum(map(len, pair)))
    size = SCORED_TOGETHER
    return [make_batch(ordered[i : i + size]) for i in range(0, len(ordered), size)]


# ------------------------------------------------------------------------------ model and loss


def encoder_decoder(args: argparse.Namespace, vocab_size: int, attention: str) -> EncoderDecoder:
    """A model that learns from few pairs in few steps: Glorot's initial weights (2010), which are
    three times GPT-2's at this width, and embeddings of variance 1 / d_model, as in Vaswani et al.
    """
    config = transformer_config(
        args,
        vocab_size=vocab_size,
        max_len=1 + max(args.longest_source, args.longest_target),
        positions="sinusoidal",
        attention=attention,
    )
    model = EncoderDecoder(config)
    for module in (*model.encoder.modules(), *model.decoder.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.head.weight, std=config.d_model**-0.5)  # the embeddings too
    return model


def teacher_forcing(args: argparse.Namespace) -> Callable[[nn.Module, Batch], tuple[Tensor, int]]:
    """The loss of the next target token, the right ones before it given; smoothed while training,
    so that what is measured on held-out pairs is the plain cross-entropy.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        batch = Batch(*(tensor.to(args.device) for tensor in batch))
        with computing(args):
            logits = model(batch.source, batch.inputs, batch.source_mask, batch.inputs_mask)
        smoothing = args.label_smoothing if model.training else 0.0
        value = cross_entropy(logits, batch.following, label_smoothing=smoothing)
        return value, int(batch.inputs_mask.sum())

    return loss


# ---------------------------------------------------------------------- from pairs to figures


def outputs(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: BPETokenizer,
    sources: Sequence[Sequence[int]],
    **decoding: Any,
) -> list[str]:
    """What the model makes of the sources: the most likely next token each time, or with
    `num_beams` and `length_penalty` what a beam search finds.
    """
    texts = [""] * len(sources)
    by_length = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for first in range(0, len(sources), SCORED_TOGETHER):
        rows = by_length[first : first + SCORED_TOGETHER]
        source, mask = pad([[*sources[row], STOP] for row in rows], PAD)
        with computing(args):
            generated = model.generate(  # type: ignore[operator]
                source.to(args.device),
                args.longest_target,
                start_token=START,
                source_mask=mask.to(args.device),
                stop_tokens=[STOP],
                do_sample=False,
                **decoding,
            )
        for row, tokens in zip(rows, generated[:, 1:].cpu(), strict=True):
            stops = (tokens == STOP).nonzero()
            texts[row] = clean(tokenizer.decode(tokens[: stops[0]] if len(stops) else tokens))
    return texts


def learn(
    args: argparse.Namespace,
    console: Console,
    corpus: Corpus,
    score: Score,
    baselines: dict[str, list[str]],
    title: str,
) -> dict[str, Any]:
    """Train an encoder-decoder on the corpus; its figures beside those of `baselines`, which are
    what something simpler makes of the held-out sources.
    """
    console.print(
        f"{len(corpus.training):,} pairs to train on, {len(corpus.held_out):,} held out, "
        f"{corpus.tokenizer.vocab_size:,} tokens; {args.device}, {args.dtype}"
    )
    runs = build_runs(
        args,
        lambda kind: encoder_decoder(args, corpus.tokenizer.vocab_size, kind),
        teacher_forcing(args),
    )
    of_training = {k: v for k, v in vars(args).items() if k not in OF_SCORING}
    tokens = [token for pair in corpus.training_tokens for side in pair for token in (*side, STOP)]
    first = fit(
        argparse.Namespace(**of_training),
        runs,
        lambda step: random_batch(corpus.training_tokens, args.seed, step, args.batch),
        even_batches(corpus.held_out_tokens),
        fingerprint(torch.tensor(tokens)),
        tokenizer=corpus.tokenizer.to_json(),
    )
    if first:
        console.print(f"resumed at step {first}")

    references = [pair.target for pair in corpus.held_out]
    sources = [pair.source for pair in corpus.held_out_tokens]
    metrics = compare(runs)
    metrics["pairs"] = {"training": len(corpus.training), "held_out": len(corpus.held_out)}
    metrics["baselines"] = {name: score(texts, references) for name, texts in baselines.items()}
    searches = {
        "greedy": {},
        "beam": {"num_beams": args.beams, "length_penalty": args.length_penalty},
    }
    made: dict[str, list[str]] = {}
    for run in reversed(runs):  # the texts of the first one stay
        for name, decoding in searches.items():
            made[name] = outputs(args, run.model, corpus.tokenizer, sources, **decoding)
            metrics["runs"][run.name][name] = score(made[name], references)
    metrics["samples"] = [
        {**pair._asdict(), **{name: texts[i] for name, texts in made.items()}}
        for i, pair in enumerate(corpus.held_out[: args.samples])
    ]
    metrics["resumed_at"] = first
    plot_losses(args.out / "loss.png", runs, {}, title)
    show(console, metrics, title)
    console.print(f"written to {args.out}: metrics.json, loss.png, checkpoint.pt")
    return metrics


def show(console: Console, metrics: dict[str, Any], title: str) -> None:
    rows = dict(metrics["baselines"])
    for name, run in metrics["runs"].items():
        for search in ("greedy", "beam"):
            rows[f"{name}, {search}"] = run[search]
    table = Table(title=f"{title}: {metrics['pairs']['held_out']} held-out pairs")
    table.add_column("")
    for figure in next(iter(rows.values())):
        table.add_column(figure, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in figures.values()))
    console.print(table)
    for name, run in metrics["runs"].items():
        console.print(
            f"{name}: {run['parameters'] / 1e6:.2f} M parameters, held-out perplexity "
            f"{run['perplexity']:.2f} a token, {run['step_ms']:.1f} ms a step"
        )
    show_comparison(console, metrics)
    for sample in metrics["samples"]:
        console.print()
        for name, text in sample.items():
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
            console.print(Text.assemble((f"{name:>7}  ", "dim"), shown))
