"""Fine-tune a pre-trained BERT to tell the topic of a text, beside the same model from scratch.

    python examples/pretrain.py                     # first: leaves its weights in runs/bert
    python examples/finetune.py                     # about half a minute on two cores
    python examples/finetune.py --labels 32         # more labelled texts: the gap closes
    python examples/finetune.py ... --resume        # go on after a kill

The topic of a docstring is the package it is in. A few labelled texts of each topic are all that
either model sees; both start from the same seed and take the same steps on the same batches, and
differ in what the encoder starts from alone. The texts asked about are those that the pre-training
held out too. Where there are no pre-trained weights, the pre-training runs first.

It writes to --out: metrics.json, accuracy.png and a checkpoint for each training. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
from collections import Counter
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
        random_rows,
        split_passages,
    )
    from rich.console import Console
    from rich.table import Table
    from training import (
        Run,
        build_runs,
        compare,
        computing,
        fit,
        mean_and_error,
        plotting,
        positive,
        run_script,
        show_comparison,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.models import SequenceClassifier

STARTS = ("pre-trained", "from scratch")


def parser() -> argparse.ArgumentParser:
    defaults = {"steps": 100, "batch": 16, "lr": 1e-3, "save_every": 25}
    parser = pretrain.arguments_after(__doc__, "finetune", **defaults)
    add = parser.add_argument
    add("--topics", type=positive, default=12, help="the most frequent so many [12]")
    add("--labels", type=positive, default=8, help="labelled texts of each topic [8]")
    add("--seeds", type=positive, default=3, help="choices of labelled texts to average over [3]")
    parser.set_defaults(quick_defaults={"attention": "both", "steps": 40, "seeds": 1})
    return parser


class Texts(NamedTuple):
    """Texts in tokens, and which topic each is about."""

    rows: list[list[int]]
    topics: list[int]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens (B, S), mask (B, S), topics (B,))"""
        tokens, mask = pad([self.rows[i] for i in indices], pretrain.PAD)
        return tokens, mask, torch.tensor([self.topics[i] for i in indices])


def choose_topics(
    training: Sequence[Passage], held_out: Sequence[Passage], most: int, labels: int
) -> list[str]:
    """The topics with the most held-out texts, of those with enough to learn from."""
    enough = Counter(passage.topic for passage in training)
    counted = Counter(p.topic for p in held_out if enough[p.topic] >= labels)
    topics = sorted(counted, key=lambda topic: (-counted[topic], topic))[:most]
    if len(topics) < 2:
        raise DataError(
            f"fewer than two topics have {labels} texts to learn from and one held out: "
            "give more text (see --data), or fewer --labels"
        )
    return topics


def in_tokens(
    passages: Sequence[Passage], topics: Sequence[str], tokenizer: Any, context: int
) -> Texts:
    """[CLS] text [SEP], cut to `context` tokens, of the passages on these topics."""
    number = {topic: i for i, topic in enumerate(topics)}
    chosen = [p for p in passages if p.topic in number]
    rows = [tokenizer.encode(p.text.encode()).tolist()[: context - 2] for p in chosen]
    framed = [[pretrain.CLS, *row, pretrain.SEP] for row in rows]
    return Texts(framed, [number[p.topic] for p in chosen])


def few(texts: Texts, labels: int, seed: int) -> Texts:
    """`labels` texts of each topic, as the seed draws them."""
    order = torch.randperm(len(texts.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: Counter[int] = Counter()
    chosen = []
    for i in order:
        if taken[texts.topics[i]] < labels:
            taken[texts.topics[i]] += 1
            chosen.append(i)
    return Texts([texts.rows[i] for i in chosen], [texts.topics[i] for i in chosen])


def classifier(
    args: argparse.Namespace,
    before: pretrain.Pretrained,
    classes: int,
    start: str,
    attention: str,
) -> SequenceClassifier:
    model = SequenceClassifier(before.config(args, attention), classes)
    if start == "pre-trained":
        model.load_encoder(before.weights)
    return model


def loss(args: argparse.Namespace, model: nn.Module, batch: Any) -> tuple[Tensor, int, Any]:
    tokens, mask, topics = (tensor.to(args.device) for tensor in batch)
    with computing(args):
        logits = model(tokens, mask)
    right = (logits.argmax(-1) == topics).sum()
    mean = nn.functional.cross_entropy(logits.float(), topics)
    return mean, len(topics), {"accuracy": (right, len(topics))}


def train_all(
    args: argparse.Namespace, before: pretrain.Pretrained, texts: Texts, held_out: Texts
) -> tuple[dict[str, list[list[Run]]], int]:
    """For each start, the runs of each seed; and how many steps were there already."""
    classes = 1 + max(held_out.topics)
    order = range(len(held_out.rows))
    batches = [held_out.batch(order[i : i + 64]) for i in range(0, len(order), 64)]
    trained: dict[str, list[list[Run]]] = {start: [] for start in STARTS}
    resumed = 0
    for seed in range(args.seed, args.seed + args.seeds):
        labelled = few(texts, args.labels, seed)
        data = fingerprint(*labelled.batch(range(len(labelled.rows))), *before.weights.values())
        for start in STARTS:
            seeded = argparse.Namespace(**{**vars(args), "seed": seed})
            runs = build_runs(
                seeded, partial(classifier, args, before, classes, start), partial(loss, args)
            )
            resumed += fit(
                seeded,
                runs,
                lambda step, few=labelled, seed=seed: few.batch(
                    random_rows(len(few.rows), seed, step, args.batch)
                ),
                batches,
                data,
                name=f"{start.replace(' ', '-')}-{seed}",
            )
            trained[start].append(runs)
    return trained, resumed


def figures(trained: dict[str, list[list[Run]]]) -> dict[str, Any]:
    """What metrics.json says: of each start, the accuracies of its seeds (first kind of attention)
    and their mean, and fused against naive where both were trained.
    """
    metrics: dict[str, Any] = {"starts": {}}
    for start, seeds in trained.items():
        accuracies = [runs[0].scores["accuracy"][-1] for runs in seeds]
        mean, error = mean_and_error(accuracies)
        metrics["starts"][start] = {
            "accuracy": mean,
            "standard_error": error,
            "seeds": [compare(runs) for runs in seeds],
        }
    by_seed = zip(*trained.values(), strict=True)
    gains = [a[0].scores["accuracy"][-1] - b[0].scores["accuracy"][-1] for a, b in by_seed]
    metrics["transfer"], metrics["transfer_standard_error"] = mean_and_error(gains)
    return metrics


def show(console: Console, metrics: dict[str, Any]) -> None:
    table = Table(
        title=f"{metrics['topics']} topics, {metrics['labels']} labelled texts of each, "
        f"{metrics['texts_held_out']} held-out texts"
    )
    for column in ("", "accuracy", "standard error", "of each seed"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("the most frequent topic", f"{metrics['chance']:.1%}", "", "")
    for start, figures in metrics["starts"].items():
        seeds = [seed["runs"] for seed in figures["seeds"]]
        each = [next(iter(runs.values()))["scores"]["accuracy"][-1] for runs in seeds]
        accuracy, error = f"{figures['accuracy']:.1%}", f"{figures['standard_error']:.1%}"
        table.add_row(start, accuracy, error, ", ".join(f"{a:.1%}" for a in each))
    console.print(table)
    console.print(
        f"the pre-training brings {metrics['transfer']:+.1%} "
        f"(standard error over seeds {metrics['transfer_standard_error']:.1%})"
    )
    for figures in metrics["starts"].values():
        show_comparison(console, figures["seeds"][0])


def plot_accuracies(path: Path, trained: dict[str, list[list[Run]]], chance: float) -> None:
    """A thin line a seed, a thick one for their mean."""
    with plotting(path) as axes:
        for color, (start, seeds) in zip(("C0", "C1"), trained.items(), strict=True):
            steps = [step for step, _ in seeds[0][0].held_out]
            curves = [runs[0].scores["accuracy"] for runs in seeds]
            for curve in curves:
                axes.plot(steps, curve, color=color, lw=0.7, alpha=0.5)
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, means, color=color, marker="o", label=start)
        axes.axhline(chance, color="gray", linestyle=":", label="the most frequent topic")
        axes.set(xlabel="step", ylabel="held-out accuracy", title="What the pre-training brings")
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.grid(alpha=0.3)


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    before = pretrain.pretrained(args, console)
    training, held_out = split_passages(args.data, fewest=16)
    topics = choose_topics(training, held_out, args.topics, args.labels)
    context = before.settings["context"]
    texts, asked = (in_tokens(p, topics, before.tokenizer, context) for p in (training, held_out))
    console.print(f"topics: {', '.join(topics)}")

    trained, resumed = train_all(args, before, texts, asked)
    metrics = figures(trained)
    metrics["topics"], metrics["labels"] = len(topics), args.labels
    metrics["topic_names"], metrics["texts_held_out"] = topics, len(asked.rows)
    metrics["chance"] = max(Counter(asked.topics).values()) / len(asked.topics)
    metrics["resumed_at"] = resumed
    plot_accuracies(args.out / "accuracy.png", trained, metrics["chance"])
    show(console, metrics)
    console.print(f"written to {args.out}: metrics.json, accuracy.png, a checkpoint a training")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Fine-tune as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work, lambda args: ["tokenizers"])


if __name__ == "__main__":
    main()
