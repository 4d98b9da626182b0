"""Pre-train a small BERT on the docstrings of Python's standard library, or on your own texts.

    python examples/pretrain.py                     # about 100 s on two cores
    python examples/pretrain.py --attention both    # fused and naive side by side
    python examples/pretrain.py --data my_texts/ --steps 5000
    python examples/pretrain.py ... --resume        # go on after a kill

Two tasks at once (Devlin et al. 2019, arXiv:1810.04805). Masked language model: which token was
here? Next sentence: is the second text what follows the first? A wrong second text comes from
another passage and is about as long as the right one, so that length tells nothing.

It writes to --out: metrics.json, loss.png, accuracy.png, checkpoint.pt. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    from data import (
        PASSAGES_HELP,
        BPETokenizer,
        DataError,
        Passage,
        fingerprint,
        pad,
        random_rows,
        split_passages,
        step_generator,
    )
    from rich.console import Console
    from rich.table import Table
    from training import (
        Run,
        arguments,
        build_runs,
        compare,
        computing,
        fit,
        perplexity,
        plot_losses,
        plotting,
        positive,
        read_checkpoint,
        run_script,
        show_comparison,
        transformer_config,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.models import MaskedLanguageModel, TransformerConfig
from fastattn.models.transformer import IGNORE

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
PAD, CLS, SEP, MASK = range(len(SPECIAL))
MARGINS = {"masked": 0.08, "pairs": 0.20}  # above chance; what the default run has to show


def parser() -> argparse.ArgumentParser:
    defaults = {"steps": 2000, "batch": 32, "lr": 3e-3, "layers": 2, "heads": 4}
    parser = arguments(__doc__, "bert", data_help=PASSAGES_HELP, **defaults)
    add = parser.add_argument
    add("--vocab", type=positive, default=2048, help="BPE tokens [2048]")
    add("--context", type=positive, default=64, help="tokens of a pair of texts, at most [64]")
    parser.set_defaults(quick_defaults={"attention": "both", "steps": 100})
    return parser


# --------------------------------------------------------------------------- pairs of sentences


class Pair(NamedTuple):
    """A passage cut in two between sentences."""

    first: list[int]
    second: list[int]
    passage: int


def make_pairs(passages: Sequence[Passage], tokenizer: Any, half: int) -> list[Pair]:
    """A pair for each place between two sentences, of the `half` tokens nearest to it each way."""
    pairs = []
    for number, passage in enumerate(passages):
        rows = [tokenizer.encode(s.encode()).tolist() for s in passage.sentences]
        for i in range(1, len(rows)):
            before, after = chain(*rows[:i]), chain(*rows[i:])
            pairs.append(Pair(list(before)[-half:], list(after)[:half], number))
    return pairs


class Batch(NamedTuple):
    """[CLS] first [SEP] second [SEP], some tokens hidden."""

    tokens: Tensor  # (B, S)
    targets: Tensor  # (B, S): what was hidden, IGNORE elsewhere
    follows: Tensor  # (B,): is it the right second text?
    mask: Tensor  # (B, S): no padding
    segments: Tensor  # (B, S): 0 for the first text, 1 for the second

    def to(self, device: Any) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


class Pairs:
    """Batches of right and wrong pairs with hidden tokens."""

    NEAR = 50  # a wrong text is among so many next to the right one in the order of lengths

    def __init__(self, pairs: Sequence[Pair], vocab_size: int):
        self.pairs, self.vocab_size = pairs, vocab_size
        self.by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i].second))
        self.rank = {i: rank for rank, i in enumerate(self.by_length)}

    def __len__(self) -> int:
        return len(self.pairs)

    def wrong_second(self, index: int, generator: torch.Generator) -> list[int]:
        """A second text of another passage, about as long as the right one: every text is as
        likely to be a right as a wrong one, and the lengths of a pair say nothing of which it is.
        """
        pair, rank = self.pairs[index], self.rank[index]
        near = self.by_length[max(0, rank - self.NEAR) : rank + self.NEAR + 1]
        others = [i for i in near if self.pairs[i].passage != pair.passage]
        others = others or [i for i in self.by_length if self.pairs[i].passage != pair.passage]
        return self.pairs[others[int(torch.randint(len(others), (), generator=generator))]].second

    def batch(
        self, rows: Sequence[int], follows: Sequence[bool], generator: torch.Generator
    ) -> Batch:
        texts, segments = [], []
        for row, right in zip(rows, follows, strict=True):
            first = self.pairs[row].first
            second = self.pairs[row].second if right else self.wrong_second(row, generator)
            texts.append([CLS, *first, SEP, *second, SEP])
            segments.append([0] * (len(first) + 2) + [1] * (len(second) + 1))
        tokens, mask = pad(texts, PAD)
        hidden, targets = mask_tokens(tokens, self.vocab_size, generator)
        return Batch(hidden, targets, torch.tensor(follows), mask, pad(segments, 0)[0])

    def random_batch(self, seed: int, step: int, batch: int) -> Batch:
        generator = step_generator(seed, step)
        follows = torch.rand(batch, generator=generator) < 0.5
        return self.batch(random_rows(len(self), seed, step, batch), follows.tolist(), generator)

    def even_batches(self, most: int, batch: int) -> list[Batch]:
        """Up to `most` pairs, each once right and once wrong, always the same."""
        rows = [i * len(self) // min(most, len(self)) for i in range(min(most, len(self)))]
        generator = torch.Generator().manual_seed(0)
        return [
            self.batch(rows[i : i + batch], [right] * len(rows[i : i + batch]), generator)
            for i in range(0, len(rows), batch)
            for right in (True, False)
        ]


def mask_tokens(
    tokens: Tensor, vocab_size: int, generator: torch.Generator, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """BERT's puzzle: of the tokens (B, S), those the model sees and those it has to tell (IGNORE
    where it has not). 15 % are chosen, never a special token; of these 80 % become [MASK], 10 %
    another token by chance, 10 % stay, so that the model cannot trust what it sees there either.
    """
    chosen = (torch.rand(tokens.shape, generator=generator) < rate) & (tokens >= len(SPECIAL))
    way = torch.rand(tokens.shape, generator=generator)
    chance = torch.randint(len(SPECIAL), vocab_size, tokens.shape, generator=generator)
    seen = tokens.masked_fill(chosen & (way < 0.8), MASK)
    seen = torch.where(chosen & (way >= 0.8) & (way < 0.9), chance, seen)
    return seen, tokens.masked_fill(~chosen, IGNORE)


# ------------------------------------------------------------------------------------- the work


def prepare(args: argparse.Namespace) -> tuple[Any, Pairs, Pairs]:
    """(tokenizer, training pairs, held-out pairs)"""
    training, held_out = split_passages(args.data, fewest=16)
    text = "\n".join(passage.text for passage in training).encode()
    tokenizer = BPETokenizer.train(text, args.vocab, SPECIAL)
    half = (args.context - 3) // 2
    if half < 1:
        raise DataError(f"--context {args.context} has no room for a pair of texts: 5 or more")
    both = [
        Pairs(make_pairs(p, tokenizer, half), tokenizer.vocab_size) for p in (training, held_out)
    ]
    for pairs, name in zip(both, ("training", "held-out"), strict=True):
        if len({pair.passage for pair in pairs.pairs}) < 2:
            raise DataError(f"the {name} text has fewer than two passages of two sentences or more")
    return tokenizer, *both


def chance(training: Pairs, held_out: Sequence[Batch]) -> dict[str, float]:
    """What knowing nothing of the context gets: the most frequent token, and a coin."""
    words = torch.tensor([t for pair in training.pairs for t in (*pair.first, *pair.second)])
    frequent = torch.bincount(words).argmax()
    targets = torch.cat([batch.targets[batch.targets != IGNORE] for batch in held_out])
    follows = torch.cat([batch.follows for batch in held_out]).float().mean().item()
    return {
        "masked": (targets == frequent).float().mean().item(),
        "pairs": max(follows, 1.0 - follows),
    }


def bert_config(args: argparse.Namespace, vocab_size: int, attention: str) -> TransformerConfig:
    return transformer_config(
        args,
        vocab_size=vocab_size,
        max_len=args.context,
        segments=2,
        positions="sinusoidal",  # a [MASK] finds its neighbours by them from the first step
        tie_weights=False,
        attention=attention,
    )


def masked_language_model(
    args: argparse.Namespace, vocab_size: int, attention: str
) -> MaskedLanguageModel:
    return MaskedLanguageModel(bert_config(args, vocab_size, attention))


def loss(args: argparse.Namespace, model: nn.Module, batch: Batch) -> tuple[Tensor, int, Any]:
    """The sum of both losses, and how many of the hidden tokens and the pairs were told right."""
    tokens, targets, follows, mask, segments = batch.to(args.device)
    with computing(args):
        masked, pairs, logits = model.losses(tokens, targets, follows, mask, segments)  # type: ignore[operator]
    hidden = targets[targets != IGNORE]
    tally = {
        "masked": ((logits.tokens.argmax(-1) == hidden).sum(), len(hidden)),
        "pairs": (((logits.follows > 0) == follows).sum(), len(follows)),
        "masked_loss": (masked * len(hidden), len(hidden)),
        "pairs_loss": (pairs * len(follows), len(follows)),
    }
    return masked + pairs, len(follows), tally


def figures(runs: list[Run], by_chance: dict[str, float]) -> dict[str, Any]:
    """What metrics.json says of the models."""
    metrics = compare(runs)
    for run in metrics["runs"].values():
        del run["perplexity"]  # of a sum of two losses it would mean nothing
        run.update({name: scores[-1] for name, scores in run["scores"].items()})
        run["masked_perplexity"] = perplexity(run["masked_loss"])
    metrics["chance"], metrics["margins"] = by_chance, MARGINS
    metrics["above_chance"] = {
        task: min(run[task] for run in metrics["runs"].values()) - level
        for task, level in by_chance.items()
    }
    return metrics


def show(console: Console, metrics: dict[str, Any]) -> None:
    table = Table(title=f"held out: {metrics['pairs_held_out']:,} pairs, right and wrong")
    columns = ("", "parameters", "masked loss", "accuracy", "pairs loss", "accuracy", "ms a step")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    by_chance = metrics["chance"]
    levels = f"{by_chance['masked']:.1%}", f"{by_chance['pairs']:.1%}"
    table.add_row("chance", "", "", levels[0], "", levels[1], "")
    for name, run in metrics["runs"].items():
        table.add_row(
            name,
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['masked_loss']:.3f}",
            f"{run['masked']:.1%}",
            f"{run['pairs_loss']:.3f}",
            f"{run['pairs']:.1%}",
            f"{run['step_ms']:.1f}",
        )
    console.print(table)
    console.print("chance: the most frequent token everywhere, and a coin")
    for task, margin in MARGINS.items():
        above = metrics["above_chance"][task]
        verdict = "as it should be" if above >= margin else "it has not learned enough"
        console.print(f"{task}: {above:+.1%} above chance, {margin:.0%} wanted: {verdict}")
    show_comparison(console, metrics)


def plot_accuracies(path: Any, runs: list[Run], by_chance: dict[str, float]) -> None:
    with plotting(path) as axes:
        for i, run in enumerate(runs):
            steps = [step for step, _ in run.held_out]
            for task, marker, color in (("masked", "o", "C0"), ("pairs", "s", "C1")):
                label = f"{run.name}, {task}" if i else f"{run.name}, {task} (held-out)"
                style = {"linestyle": (0, (4, 3))} if i else {}
                axes.plot(steps, run.scores[task], marker=marker, color=color, label=label, **style)
        for task, color in (("masked", "C0"), ("pairs", "C1")):
            axes.axhline(by_chance[task], color=color, linestyle=":", label=f"{task}, by chance")
        axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title="What BERT tells right")
        axes.legend()
        axes.grid(alpha=0.3)


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    tokenizer, training, held_out = prepare(args)
    batches = held_out.even_batches(256, args.batch)
    by_chance = chance(training, batches)
    console.print(
        f"{len(training):,} pairs to train on, {len(held_out):,} held out; "
        f"{tokenizer.vocab_size:,} tokens; {args.device}, {args.dtype}"
    )
    runs = build_runs(
        args,
        partial(masked_language_model, args, tokenizer.vocab_size),
        partial(loss, args),
    )
    first = fit(
        args,
        runs,
        lambda step: training.random_batch(args.seed, step, args.batch),
        batches,
        fingerprint(batches[0].tokens, *(torch.tensor(pair.second) for pair in training.pairs)),
        tokenizer=tokenizer.to_json(),
    )
    if first:
        console.print(f"resumed at step {first}")

    metrics = figures(runs, by_chance)
    metrics["pairs_held_out"] = sum(len(batch.follows) for batch in batches)
    metrics["resumed_at"] = first
    plot_losses(args.out / "loss.png", runs, {}, "BERT: masked token + next sentence, both losses")
    plot_accuracies(args.out / "accuracy.png", runs, by_chance)
    show(console, metrics)
    console.print(f"written to {args.out}: metrics.json, loss.png, accuracy.png, checkpoint.pt")
    return metrics


# ------------------------------------------------------------------------- for what comes after


class Pretrained(NamedTuple):
    """What this script left, for others to start from."""

    tokenizer: BPETokenizer
    weights: dict[str, Tensor]
    settings: dict[str, Any]  # of the pre-training: "context", "d_model", ...

    def size(self, args: argparse.Namespace) -> argparse.Namespace:
        """The arguments with the size of the pre-trained model."""
        names = ("d_model", "layers", "heads", "context")
        return argparse.Namespace(**{**vars(args), **{n: self.settings[n] for n in names}})

    def config(self, args: argparse.Namespace, attention: str) -> TransformerConfig:
        """The configuration of the pre-trained encoder, with the dropout of `args`."""
        return bert_config(self.size(args), self.tokenizer.vocab_size, attention)

    def model(self, attention: str) -> MaskedLanguageModel:
        """The pre-trained model, to be asked."""
        settings = argparse.Namespace(**self.settings)
        model = masked_language_model(settings, self.tokenizer.vocab_size, attention)
        model.load_state_dict(self.weights)
        return model.eval()


def arguments_after(description: str, task: str, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments of a script that starts from what this one left; its model has that size."""
    parser = arguments(description, task, data_help=PASSAGES_HELP, **defaults)
    add = parser.add_argument
    add("--pretrained", type=Path, default=Path("runs/bert"), help="--out of pretrain.py")
    parser.set_defaults(d_model=None, layers=None, heads=None)
    return parser


def pretrained(args: argparse.Namespace, console: Console) -> Pretrained:
    """The weights in args.pretrained; where there are none, the pre-training runs first."""
    for name in ("d_model", "layers", "heads"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise DataError(f"{option}: the size is the pre-trained model's, see pretrain.py")
    path = args.pretrained / "checkpoint.pt"
    if not path.exists() or (args.resume and not finished(read_checkpoint(path, "bert"))):
        console.print(f"{path} is not finished: pre-training first, as pretrain.py does by default")
        data = [] if args.data is None else ["--data", str(args.data)]
        main(["--resume", "--out", str(args.pretrained), "--device", args.device, *data])
    return read_pretrained(path)


def finished(state: dict[str, Any]) -> bool:
    return state["step"] == state["settings"]["steps"]


def read_pretrained(checkpoint: Path) -> Pretrained:
    state = read_checkpoint(checkpoint, "bert")
    if not finished(state):
        raise DataError(
            f"{checkpoint} is no finished pre-training: python examples/pretrain.py --resume "
            f"--out {checkpoint.parent}, with the arguments it was begun with, goes on with it"
        )
    tokenizer = BPETokenizer.from_json(state["tokenizer"])
    return Pretrained(tokenizer, next(iter(state["runs"].values()))["model"], state["settings"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pre-train as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work, lambda args: ["tokenizers"])


if __name__ == "__main__":
    main()
