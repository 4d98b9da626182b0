"""Few-shot prompts for a small language model: how its answers change with the examples shown.

    python examples/pretrain.py                     # first: the encoder that knows what is similar
    python examples/select_demonstrations.py        # about a minute on two cores
    python examples/select_demonstrations.py ... --resume

The task is to name the package that a docstring is from. A prompt shows a few solved examples
(demonstrations) and then a query:

    [CLS] docstring [SEP] package [CLS] docstring [SEP] package [CLS] docstring [SEP] ...

The language model learns the task from prompts like that (Min et al. 2022, MetaICL,
arXiv:2110.15943), the loss being that of the answers alone; the demonstrations of a training prompt
come from few packages, so that some of them often help. Then queries that neither model has seen
are asked with demonstrations picked from the training texts: at random, by the similarity of the
pre-trained encoder's mean states (Liu et al. 2022, arXiv:2101.06804), or similar to the query and
unlike each other (maximal marginal relevance, Carbonell and Goldstein 1998).

It writes to --out: metrics.json, loss.png, picks.png, checkpoint.pt. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    import pretrain
    from data import (
        DataError,
        Passage,
        fingerprint,
        pad,
        split_passages,
        step_generator,
    )
    from rich.console import Console
    from rich.table import Table
    from training import (
        build_runs,
        compare,
        computing,
        fit,
        mean_and_error,
        plot_losses,
        plotting,
        positive,
        run_script,
        show_comparison,
        transformer_config,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.models import LanguageModel, MaskedLanguageModel, cross_entropy, mean_pool
from fastattn.models.transformer import IGNORE

PICKS = ("none", "random", "similar", "diverse")


def parser() -> argparse.ArgumentParser:
    defaults = {"steps": 1200, "batch": 8, "lr": 2e-3}
    parser = pretrain.arguments_after(__doc__, "demonstrations", **defaults)
    add = parser.add_argument
    add("--shots", type=positive, default=4, help="demonstrations in a prompt [4]")
    add("--text", type=positive, default=24, help="tokens of a text, at most [24]")
    add("--queries", type=positive, default=500, help="held-out texts to ask about [500]")
    parser.set_defaults(quick_defaults={"attention": "both", "steps": 60, "queries": 100})
    return parser


# -------------------------------------------------------------------------------------- prompts


class Example(NamedTuple):
    """A text and the name of its topic, in tokens."""

    text: list[int]
    answer: list[int]
    topic: str


def make_examples(passages: Sequence[Passage], tokenizer: Any, longest: int) -> list[Example]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text.encode()).tolist()

    names = {topic: encode(topic) for topic in {p.topic for p in passages}}
    return [Example(encode(p.text)[:longest], names[p.topic], p.topic) for p in passages]


def prompt(examples: Sequence[Example], every: bool) -> tuple[list[int], list[int]]:
    """(tokens, targets) of examples in a row, the last of them the query. What is to be predicted
    is the answers, every one or the query's alone, each ended by [CLS], which begins the next.
    """
    tokens, targets = [pretrain.CLS], []
    for example in examples:
        answer = [*example.answer, pretrain.CLS]
        tokens += [*example.text, pretrain.SEP, *answer]
        wanted = every or example is examples[-1]
        targets += [IGNORE] * (len(example.text) + 1)
        targets += answer if wanted else [IGNORE] * len(answer)
    return tokens[:-1], targets  # a target is the token after the one it stands at


class Prompts(NamedTuple):
    tokens: Tensor  # (B, S)
    targets: Tensor  # (B, S): the answers' tokens, one place early; IGNORE elsewhere
    mask: Tensor  # (B, S)


def make_batch(rows: Sequence[Sequence[Example]], every: bool) -> Prompts:
    made = [prompt(examples, every) for examples in rows]
    tokens, mask = pad([tokens for tokens, _ in made], pretrain.PAD)
    return Prompts(tokens, pad([targets for _, targets in made], IGNORE)[0], mask)


class Lessons:
    """Prompts to learn from: from one topic to as many as there are examples in a prompt."""

    def __init__(self, examples: Sequence[Example], count: int):
        self.examples, self.count = examples, count  # examples in a prompt
        self.of_topic: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            self.of_topic.setdefault(example.topic, []).append(i)

    def prompt(self, generator: torch.Generator) -> list[Example]:
        """No example twice: each is drawn from a topic of the prompt, while it has any left."""

        def below(bound: int) -> int:
            return int(torch.randint(bound, (), generator=generator))

        topics = [
            self.examples[below(len(self.examples))].topic for _ in range(1 + below(self.count))
        ]
        chosen: list[int] = []
        while len(chosen) < self.count:
            among = self.of_topic[topics[below(len(topics))]]
            i = among[below(len(among))]
            if i in chosen:
                i = below(len(self.examples))
            if i not in chosen:
                chosen.append(i)
        return [self.examples[i] for i in chosen]

    def batch(self, seed: int, step: int, batch: int) -> Prompts:
        generator = step_generator(seed, step)
        return make_batch([self.prompt(generator) for _ in range(batch)], every=True)


# ---------------------------------------------------------------------------------- the choosing


@torch.no_grad()
def embed(model: MaskedLanguageModel, examples: Sequence[Example], device: str) -> Tensor:
    """(len(examples), E): the mean state of each text in the pre-trained encoder."""
    model.eval()
    vectors = []
    for i in range(0, len(examples), 64):
        framed = [[pretrain.CLS, *e.text, pretrain.SEP] for e in examples[i : i + 64]]
        tokens, mask = (tensor.to(device) for tensor in pad(framed, pretrain.PAD))
        vectors.append(mean_pool(model.encoder(tokens, mask), mask).cpu())
    return torch.cat(vectors)


def directions(vectors: Tensor, centre: Tensor) -> Tensor:
    """Unit vectors seen from the centre: what all texts have in common says nothing about one."""
    return nn.functional.normalize(vectors - centre, dim=-1)


def most_similar(query: Tensor, pool: Tensor, count: int) -> list[int]:
    """The `count` of the pool (N, E) nearest to the query (E,) by cosine, the nearest last: next to
    the query (Liu et al. 2022).
    """
    return (pool @ query).topk(count).indices.flip(0).tolist()


def maximal_marginal_relevance(
    query: Tensor, pool: Tensor, count: int, relevance: float = 0.5
) -> list[int]:
    """One after the other the text i of the largest

        relevance * cos(i, query) - (1 - relevance) * max over those chosen j of cos(i, j)

    (Carbonell and Goldstein 1998, doi:10.1145/290941.291025); the first one, the nearest, last.
    """
    similarity = pool @ query
    repeated = torch.zeros(len(pool))
    chosen: list[int] = []
    for _ in range(count):
        score = relevance * similarity - (1.0 - relevance) * repeated
        score[chosen] = -math.inf
        chosen.append(int(score.argmax()))
        likeness = pool @ pool[chosen[-1]]
        repeated = likeness if len(chosen) == 1 else torch.maximum(repeated, likeness)
    return chosen[::-1]


def pick(
    how: str, query: Tensor, pool: Tensor, count: int, generator: torch.Generator
) -> list[int]:
    if how == "none":
        return []
    if how == "random":
        return torch.randperm(len(pool), generator=generator)[:count].tolist()
    choose = most_similar if how == "similar" else maximal_marginal_relevance
    return choose(query, pool, count)


# --------------------------------------------------------------------------------------- asking


def language_model(
    args: argparse.Namespace, before: pretrain.Pretrained, longest: int, attention: str
) -> LanguageModel:
    """Its decoder starts from the encoder's weights (Rothe et al. 2020, arXiv:1907.12461), since
    minutes are too short to learn from answers alone what words have to do with each other.
    """
    config = transformer_config(
        before.size(args),
        vocab_size=before.tokenizer.vocab_size,
        max_len=longest,
        positions="sinusoidal",
        tie_weights=False,
        attention=attention,
    )
    model = LanguageModel(config)
    own = model.decoder.state_dict()
    model.decoder.load_state_dict({name: before.weights[f"encoder.{name}"] for name in own})
    return model


def answer_logits(args: argparse.Namespace, model: nn.Module, batch: Prompts) -> tuple[Tensor, Any]:
    """The logits (N, V) of the N tokens that are to be predicted, and those tokens (N,)."""
    tokens, targets, mask = (tensor.to(args.device) for tensor in batch)
    wanted = targets != IGNORE
    with computing(args):
        logits = model.head(model.decoder(tokens, mask)[wanted])  # type: ignore[operator, union-attr]
    return logits, targets[wanted]


def loss(args: argparse.Namespace, model: nn.Module, batch: Prompts) -> tuple[Tensor, int]:
    logits, targets = answer_logits(args, model, batch)
    return cross_entropy(logits, targets), len(targets)


@torch.no_grad()
def ask(
    args: argparse.Namespace, model: nn.Module, rows: Sequence[Sequence[Example]]
) -> tuple[Tensor, Tensor]:
    """For each prompt, whether the most likely answer is right (all its tokens are the most likely
    ones: what greedy generation would give), and the log-probability of the right one.
    """
    model.eval()
    right, likelihood = [], []
    for i in range(0, len(rows), 32):
        batch = make_batch(rows[i : i + 32], every=False)
        logits, targets = answer_logits(args, model, batch)
        log_p = logits.float().log_softmax(-1)
        lengths = (batch.targets != IGNORE).sum(1).tolist()
        told = (log_p.argmax(-1) == targets).split(lengths)
        scores = log_p.gather(-1, targets[:, None])[:, 0].split(lengths)
        right += [bool(t.all()) for t in told]
        likelihood += [s.sum().item() for s in scores]
    return torch.tensor(right, dtype=torch.float64), torch.tensor(likelihood, dtype=torch.float64)


def compare_picks(
    args: argparse.Namespace,
    model: nn.Module,
    encoder: MaskedLanguageModel,
    pool: Sequence[Example],
    queries: Sequence[Example],
) -> dict[str, Any]:
    """What metrics.json says of each way to pick."""
    vectors = embed(encoder, pool, args.device)
    centre = vectors.mean(0)
    places, sought = (
        directions(vectors, centre),
        directions(embed(encoder, queries, args.device), centre),
    )
    found: dict[str, Any] = {}
    answers: dict[str, tuple[Tensor, Tensor]] = {}
    for how in PICKS:
        generator = torch.Generator().manual_seed(args.seed)
        shown = [[pool[i] for i in pick(how, q, places, args.shots, generator)] for q in sought]
        prompts = [[*s, query] for s, query in zip(shown, queries, strict=True)]
        right, likelihood = answers[how] = ask(args, model, prompts)
        figures = {
            "accuracy": mean_and_error(right.tolist()),
            "log_probability": mean_and_error(likelihood.tolist()),
        }
        pairs = list(zip(shown, queries, strict=True))
        figures["answer_shown"] = sum(q.topic in {e.topic for e in s} for s, q in pairs) / len(
            pairs
        )
        if shown[0]:
            figures["copy_last"] = sum(s[-1].topic == q.topic for s, q in pairs) / len(pairs)
        found[how] = figures
    for how in PICKS:  # of the same queries, so that their differences count, not their levels
        pairs = zip(answers[how], answers["random"], strict=True)
        differences = [(ours - theirs).tolist() for ours, theirs in pairs]
        found[how]["accuracy_over_random"] = mean_and_error(differences[0])
        found[how]["log_probability_over_random"] = mean_and_error(differences[1])
    return found


def show(console: Console, metrics: dict[str, Any]) -> None:
    table = Table(
        title=f"{metrics['queries']} held-out queries, {metrics['shots']} demonstrations each "
        "(± standard error)"
    )
    columns = ("demonstrations", "accuracy", "over random", "log p of the answer", "over random")
    for column in (*columns, "answer is shown", "copying the last"):
        table.add_column(column, justify="right" if column != "demonstrations" else "left")
    for how, figures in metrics["picks"].items():
        percent = [figures["accuracy"], figures["accuracy_over_random"]]
        nats = [figures["log_probability"], figures["log_probability_over_random"]]
        table.add_row(
            how,
            f"{percent[0][0]:.1%} ± {percent[0][1]:.1%}",
            "" if how == "random" else f"{percent[1][0]:+.1%} ± {percent[1][1]:.1%}",
            f"{nats[0][0]:.2f} ± {nats[0][1]:.2f}",
            "" if how == "random" else f"{nats[1][0]:+.2f} ± {nats[1][1]:.2f}",
            f"{figures['answer_shown']:.1%}" if "copy_last" in figures else "",
            f"{figures['copy_last']:.1%}" if "copy_last" in figures else "",
        )
    console.print(table)
    console.print(f"the most frequent topic is right for {metrics['chance']:.1%}")
    show_comparison(console, metrics)


def plot_picks(path: Path, picks: dict[str, Any], chance: float) -> None:
    with plotting(path, ncols=2) as axes:
        for one, figure, label in zip(
            axes, ("accuracy", "log_probability"), ("accuracy", "log p of the answer"), strict=True
        ):
            means, errors = zip(*(picks[how][figure] for how in picks), strict=True)
            one.bar(list(picks), means, yerr=errors, capsize=4, color=["C7", "C0", "C1", "C2"])
            one.set(ylabel=label, xlabel="demonstrations")
        axes[0].axhline(chance, color="gray", linestyle=":", label="the most frequent topic")
        axes[0].legend()


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    before = pretrain.pretrained(args, console)
    training, held_out = split_passages(args.data, fewest=16)
    if args.text + 2 > before.settings["context"]:
        raise DataError(
            f"--text {args.text} is more than the pre-trained encoder reads: at most "
            f"{before.settings['context'] - 2}"
        )
    pool, queries = (make_examples(p, before.tokenizer, args.text) for p in (training, held_out))
    topics = {example.topic for example in pool}
    queries = [query for query in queries if query.topic in topics][: args.queries]
    if len(topics) < 2 or len(pool) <= args.shots or len(queries) < 2:
        raise DataError(
            f"{len(pool)} texts of {len(topics)} topics and {len(queries)} to ask about are too "
            f"few for {args.shots} demonstrations: give more text, in folders (see --data)"
        )
    console.print(f"{len(pool):,} texts of {len(topics)} topics to learn and to pick from")

    longest = (args.shots + 1) * (args.text + 2 + max(len(e.answer) for e in (*pool, *queries)))
    runs = build_runs(args, partial(language_model, args, before, longest), partial(loss, args))
    lessons, checks = (
        Lessons(pool, args.shots + 1),
        Lessons(queries, min(args.shots + 1, len(queries))),
    )
    held_out_batches = [checks.batch(0, step, args.batch) for step in range(8)]
    first = fit(
        args,
        runs,
        lambda step: lessons.batch(args.seed, step, args.batch),
        held_out_batches,
        fingerprint(*lessons.batch(0, 0, 64), *before.weights.values()),
    )
    if first:
        console.print(f"resumed at step {first}")

    encoder = before.model(runs[0].name).to(args.device)
    metrics = compare(runs)
    metrics["picks"] = compare_picks(args, runs[0].model, encoder, pool, queries)
    metrics["queries"], metrics["shots"], metrics["resumed_at"] = len(queries), args.shots, first
    frequent = max(topics, key=lambda topic: (len(lessons.of_topic[topic]), topic))
    metrics["chance"] = sum(query.topic == frequent for query in queries) / len(queries)
    plot_losses(args.out / "loss.png", runs, {}, "Answers in prompts, the language model's loss")
    plot_picks(args.out / "picks.png", metrics["picks"], metrics["chance"])
    show(console, metrics)
    console.print(f"written to {args.out}: metrics.json, loss.png, picks.png, checkpoint.pt")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and ask as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work, lambda args: ["tokenizers"])


if __name__ == "__main__":
    main()
