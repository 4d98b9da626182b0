"""Train a small language model on the source of Python's standard library, or on your own text.

    python examples/train_lm.py                          # under four minutes on two cores
    python examples/train_lm.py --attention both         # fused and naive side by side
    python examples/train_lm.py --data my_novel.txt --tokenizer byte --steps 2000
    python examples/train_lm.py ... --resume             # go on after a kill

Beside it, on the same text and tokens: an n-gram model with Kneser-Ney smoothing, which counts all
of the text, and an LSTM of as many parameters, which sees the same batches (--no-baselines leaves
them out). Learning rate and dropout are what did best for each: the LSTM wants three times the rate
and twice the dropout. The LSTM learns faster at first; after 1,200 steps the Transformer is ahead.

It writes to --out: metrics.json, loss.png, checkpoint.pt. Needs `pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from baselines import NGramModel, UnigramModel, lstm_of
    from data import (
        BPETokenizer,
        ByteTokenizer,
        DataError,
        even_windows,
        fingerprint,
        random_windows,
        read_text,
    )
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text
    from training import (
        Run,
        arguments,
        build_runs,
        compare,
        computing,
        fit,
        fraction,
        perplexity,
        plot_losses,
        positive,
        positive_float,
        read_checkpoint,
        run_script,
        show_comparison,
        transformer_config,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.models import LanguageModel, cross_entropy

TRAINED_FOR = 150  # steps of a model that is only there to show something


def parser() -> argparse.ArgumentParser:
    size = {"d_model": 160, "layers": 2, "heads": 5}
    rates = {"lr": 4e-3, "dropout": 0.05}
    parser = arguments(__doc__, "lm", steps=2300, batch=16, **size, **rates)
    add = parser.add_argument
    add("--data-mb", type=positive_float, default=3.0, help="read at most so many megabytes [3]")
    add("--tokenizer", choices=("byte", "bpe"), default="bpe")
    add("--vocab", type=positive, default=1024, help="BPE tokens [1024]")
    add("--context", type=positive, default=64, help="tokens a sequence [64]")
    switch = argparse.BooleanOptionalAction
    add("--baselines", action=switch, default=True, help="an n-gram and an LSTM model beside it")
    add("--ngram", type=positive, default=5, help="order of the Kneser-Ney model [5]")
    add("--lstm-lr", type=positive_float, default=1.2e-2, help="highest learning rate of the LSTM")
    add("--lstm-dropout", type=fraction, default=0.12, help="of the LSTM [0.12]")
    parser.set_defaults(quick_defaults={"attention": "both", "steps": 240, "baselines": False})
    return parser


def prepare(args: argparse.Namespace) -> tuple[Any, Tensor, Tensor, int]:
    """(tokenizer, training tokens, held-out tokens, held-out bytes). The last tenth is held out."""
    text = read_text(args.data, int(args.data_mb * 1e6))
    cut = len(text) * 9 // 10
    tokenizer: Any = ByteTokenizer()
    if args.tokenizer == "bpe":
        tokenizer = BPETokenizer.train(text[:cut], args.vocab)
    training, held_out = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    if len(held_out) <= args.context:
        raise DataError(
            f"the text has {len(training) + len(held_out)} tokens, of which a tenth is held out; "
            f"--context {args.context} needs about {10 * (args.context + 1)}: "
            "give more text or a shorter context"
        )
    return tokenizer, training, held_out, len(text) - cut


def language_model(args: argparse.Namespace, vocab_size: int, attention: str) -> LanguageModel:
    config = transformer_config(
        args,
        vocab_size=vocab_size,
        max_len=args.context,
        tie_weights=False,  # with so few tokens and steps, a table of its own learns faster
        positions="sinusoidal",  # and there is no table of positions to learn
        init_std=0.06,  # the model is narrow
        attention=attention,
    )
    return LanguageModel(config)


def load(checkpoint: Path, attention: str = "fused") -> tuple[LanguageModel, Any]:
    """(model, tokenizer) of a checkpoint of this script; DataError where it is none."""
    state = read_checkpoint(checkpoint, "lm")
    settings = argparse.Namespace(**state["settings"])
    tokenizer: Any = ByteTokenizer()
    if settings.tokenizer == "bpe":
        tokenizer = BPETokenizer.from_json(state["tokenizer"])
    model = language_model(settings, tokenizer.vocab_size, attention)
    model.load_state_dict(next(iter(state["runs"].values()))["model"])
    return model.eval(), tokenizer


def find_or_train(args: argparse.Namespace, console: Console) -> Path:
    """--checkpoint or, where it is not given, that in runs/lm; if there is none, that of a model
    that is trained for a moment.
    """
    if args.checkpoint is not None:
        return args.checkpoint
    left = parser().get_default("out") / "checkpoint.pt"
    if left.exists():
        return left
    console.print(
        f"There is no trained model here: a tiny one is trained now, for {TRAINED_FOR} steps, and "
        "will make little sense. For a better one run examples/train_lm.py first.",
        style="yellow",
    )
    out = args.out / "tiny-model"
    tiny = [f"--steps={TRAINED_FOR}", "--d-model=64", "--layers=2", "--heads=2", "--vocab=512"]
    tiny += ["--data-mb=0.5", "--no-baselines", "--resume"]
    main([*tiny, f"--seed={args.seed}", f"--device={args.device}", f"--out={out}"])
    return out / "checkpoint.pt"


def count_text(
    build: Callable[[Tensor, int], UnigramModel | NGramModel],
    training: Tensor,
    held_out: tuple[Tensor, Tensor],
    vocab: int,
) -> dict[str, float]:
    """What metrics.json says of a model that counts all of the training text, once."""
    started = time.perf_counter()
    model = build(training, vocab)
    seconds = time.perf_counter() - started
    loss = -model.log_p(*held_out).mean().item()
    return {
        "parameters": model.parameters,
        "training_seconds": seconds,
        "loss": loss,
        "perplexity": perplexity(loss),
    }


def lstm_run(args: argparse.Namespace, beside: Run, vocab: int) -> Run:
    """An LSTM of as many parameters as the model that it trains beside, on the same batches."""
    parameters = sum(p.numel() for p in beside.model.parameters())
    torch.manual_seed(args.seed)
    return Run(
        "lstm",
        lstm_of(parameters, vocab, args.lstm_dropout).to(args.device),
        beside.loss,
        args.lstm_lr,
    )


def figures(
    args: argparse.Namespace,
    runs: list[Run],
    counted: dict[str, dict[str, float]],  # models that are no runs, by name
    bytes_per_token: float,
) -> dict[str, Any]:
    """What metrics.json says of the models."""
    tokens = args.batch * args.context
    metrics = compare(runs)
    for run in metrics["runs"].values():
        run["bits_per_byte"] = run["held_out"][-1][1] / math.log(2) / bytes_per_token
        run["tokens_per_second"] = 1e3 * tokens / run["step_ms"]
    for model in counted.values():
        model["bits_per_byte"] = model["loss"] / math.log(2) / bytes_per_token
    metrics["tokens_trained"] = args.steps * tokens
    metrics["counted"] = counted
    return metrics


def show(console: Console, metrics: dict[str, Any], names: dict[str, str]) -> None:
    table = Table(title=f"{metrics['tokens_trained']:,} tokens of training")
    table.add_column("")
    for column in ("perplexity", "bits a byte", "parameters", "training", "a step", "tokens/s"):
        table.add_column(column, justify="right")
    for name, model in {**metrics["counted"], **metrics["runs"]}.items():
        row = [f"{model['perplexity']:.2f}", f"{model['bits_per_byte']:.3f}"]
        row += [f"{model['parameters'] / 1e6:.2f} M", f"{model['training_seconds']:.1f} s"]
        if "step_ms" in model:
            row += [f"{model['step_ms']:.1f} ms", f"{model['tokens_per_second']:,.0f}"]
        table.add_row(names.get(name, f"Transformer, {name}"), *row)
    console.print(table)
    console.print(f"perplexity over {metrics['tokens_held_out']:,} tokens of held-out text")
    show_comparison(console, metrics)


def sample(run: Run, tokenizer: Any, held_out: Tensor, args: argparse.Namespace) -> tuple[str, str]:
    """A prompt from the held-out text and how the model goes on."""
    length = min(48, max(1, args.context // 2))
    prompt = held_out[None, :length].to(args.device)
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": args.seed}
    tokens = run.model.generate(prompt, min(240, args.context - length), **options)[0]  # type: ignore[operator]
    return tokenizer.decode(tokens[:length]), tokenizer.decode(tokens[length:])


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    tokenizer, training, held_out, held_out_bytes = prepare(args)
    inputs, targets = even_windows(held_out, 128, args.context)
    vocab = tokenizer.vocab_size
    unigram = count_text(UnigramModel, training, (inputs, targets), vocab)
    console.print(
        f"{len(training):,} tokens to train on, {len(held_out):,} held out; "
        f"unigram perplexity {unigram['perplexity']:.2f}; {args.device}, {args.dtype}"
    )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        tokens, following = (tensor.to(args.device) for tensor in batch)
        with computing(args):
            logits = model(tokens)
        return cross_entropy(logits, following), following.numel()

    runs = build_runs(args, lambda kind: language_model(args, vocab, kind), loss)
    counted = {"unigram": unigram}
    if args.baselines:
        ngram = partial(NGramModel, order=args.ngram)
        counted["ngram"] = count_text(ngram, training, (inputs, targets), vocab)
        runs.append(lstm_run(args, runs[0], vocab))
    first = fit(
        args,
        runs,
        lambda step: random_windows(training, args.seed, step, args.batch, args.context),
        list(zip(inputs.split(8), targets.split(8), strict=True)),
        fingerprint(training),
        tokenizer=tokenizer.to_json(),
    )
    if first:
        console.print(f"resumed at step {first}")

    metrics = figures(args, runs, counted, held_out_bytes / len(held_out))
    metrics["tokens_held_out"] = targets.numel()
    metrics["resumed_at"] = first
    prompt, continuation = sample(runs[0], tokenizer, held_out, args)
    metrics["sample"] = {"prompt": prompt, "continuation": continuation}
    title = f"Language model, {args.dtype}"
    names = {"unigram": "unigram", "ngram": f"{args.ngram}-gram", "lstm": "LSTM"}
    levels = {names[name]: model["loss"] for name, model in counted.items()}
    plot_losses(args.out / "loss.png", runs, levels, title)
    show(console, metrics, names)
    console.print(Panel(Text.assemble((prompt, "dim"), continuation), title="a sample"))
    console.print(f"written to {args.out}: metrics.json, loss.png, checkpoint.pt")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the command line says; returns what metrics.json holds."""
    return run_script(
        parser(), argv, work, lambda args: ["tokenizers"] if args.tokenizer == "bpe" else []
    )


if __name__ == "__main__":
    main()
