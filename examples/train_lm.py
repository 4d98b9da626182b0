"""Train a small language model on the source of Python's standard library, or on your own text.

    python examples/train_lm.py                          # about 90 s on two cores
    python examples/train_lm.py --attention both         # fused and naive side by side
    python examples/train_lm.py --data my_novel.txt --tokenizer bpe --steps 2000
    python examples/train_lm.py ... --resume             # go on after a kill

It writes to --out: metrics.json, loss.png, checkpoint.pt and, with BPE, tokenizer.json. Needs
`pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text
    from training import (
        BPETokenizer,
        ByteTokenizer,
        DataError,
        Diverged,
        Run,
        even_windows,
        median,
        perplexity,
        plot_losses,
        random_windows,
        read_text,
        replacing,
        save_json,
        train,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.models import LanguageModel, TransformerConfig, cross_entropy

QUICK = {"attention": "both", "steps": 240}


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--attention", choices=("fused", "naive", "both"), default="fused")
    add("--quick", action="store_true", help="fused and naive side by side in about 45 s")
    add("--data", type=Path, help="a text file or a folder of them [the standard library's source]")
    add("--data-mb", type=positive_float, default=4.0, help="read at most so many megabytes [4]")
    add("--tokenizer", choices=("byte", "bpe"), default="byte")
    add("--vocab", type=positive, default=1024, help="BPE tokens [1024]")
    add("--steps", type=positive, default=700)
    add("--batch", type=positive, default=4, help="sequences a step [4]")
    add("--context", type=positive, default=256, help="tokens a sequence [256]")
    add("--d-model", type=positive, default=128)
    add("--layers", type=positive, default=3)
    add("--heads", type=positive, default=2)
    add("--dropout", type=float, default=0.0)
    add("--lr", type=positive_float, default=4e-3, help="the highest learning rate [4e-3]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    add("--device", type=usable, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/lm"), help="where results go [runs/lm]")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    add("--save-every", type=positive, default=25, help="steps between checkpoints [25]")
    first, _ = parser.parse_known_args(argv)
    if first.quick:  # presets are defaults, so whatever is named beside --quick holds
        parser.set_defaults(**QUICK)
    return parser, parser.parse_args(argv)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def positive_float(text: str) -> float:
    if not 0.0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for want of CUDA
        raise argparse.ArgumentTypeError(f"{device}: {str(error).splitlines()[0]}") from None
    return device


def check_extras(tokenizer: str) -> None:
    """Before the training, not after it."""
    needed = ("matplotlib", "tokenizers") if tokenizer == "bpe" else ("matplotlib",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise DataError(f"needs {' and '.join(missing)}: pip install 'fastattn[examples]'")


def prepare(args: argparse.Namespace) -> tuple[Any, Tensor, Tensor, int]:
    """(tokenizer, training tokens, held-out tokens, held-out bytes). The last tenth is held out."""
    text = read_text(args.data, int(args.data_mb * 1e6))
    cut = len(text) * 9 // 10
    tokenizer: Any = ByteTokenizer()
    if args.tokenizer == "bpe":
        tokenizer = BPETokenizer.train(text[:cut], args.vocab)
        with replacing(args.out / "tokenizer.json") as partial:
            tokenizer.tokenizer.save(str(partial))
    training, held_out = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    if len(held_out) <= args.context:
        raise DataError(
            f"the text has {len(training) + len(held_out)} tokens, of which a tenth is held out; "
            f"--context {args.context} needs about {10 * (args.context + 1)}: "
            "give more text or a shorter context"
        )
    return tokenizer, training, held_out, len(text) - cut


def unigram_loss(training: Tensor, targets: Tensor, vocab_size: int) -> float:
    """The loss of a model that knows how frequent each token is, and nothing else."""
    counts = torch.bincount(training, minlength=vocab_size).double() + 1.0
    return -(counts / counts.sum()).log()[targets].mean().item()


def build_runs(args: argparse.Namespace, vocab_size: int) -> list[Run]:
    """A run for each kind of attention, all from the same initial weights."""
    dtype = getattr(torch, args.dtype)
    device = torch.device(args.device)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        return cross_entropy(logits, targets)

    runs = []
    for attention in ("fused", "naive") if args.attention == "both" else (args.attention,):
        config = TransformerConfig(
            vocab_size=vocab_size,
            max_len=args.context,
            d_model=args.d_model,
            n_heads=args.heads,
            n_layers=args.layers,
            dropout=args.dropout,
            tie_weights=False,  # with so few tokens and steps, a table of its own learns faster
            attention=attention,
        )
        torch.manual_seed(args.seed)
        runs.append(Run(attention, LanguageModel(config).to(device), loss))
    return runs


def report(
    args: argparse.Namespace,
    runs: list[Run],
    unigram: float,
    evaluated: int,
    bytes_per_token: float,
) -> dict[str, Any]:
    """The figures of metrics.json."""
    tokens = args.batch * args.context
    metrics: dict[str, Any] = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in runs[0].model.parameters()),
        "tokens_trained": args.steps * tokens,
        "tokens_held_out": evaluated,
        "unigram_perplexity": math.exp(unigram),
        "unigram_bits_per_byte": unigram / math.log(2) / bytes_per_token,
        "runs": {},
    }
    for run in runs:
        final, seconds = run.held_out[-1][1], median(run.seconds)
        metrics["runs"][run.name] = {
            "perplexity": perplexity(final),
            "bits_per_byte": final / math.log(2) / bytes_per_token,
            "step_ms": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "losses": run.losses,
            "held_out": run.held_out,
        }
    if len(runs) == 2:
        fused, naive = runs
        differences = [abs(a - b) for a, b in zip(fused.losses, naive.losses, strict=True)]
        metrics["loss_difference_max"] = max(differences)
        metrics["loss_difference"] = differences
        # of the two times of a step, so that both had the machine in the same state
        ratios = [b / a for a, b in zip(fused.seconds, naive.seconds, strict=True)]
        metrics["step_time_ratio"] = median(ratios)
    return metrics


def show(console: Console, metrics: dict[str, Any]) -> None:
    title = f"{metrics['parameters'] / 1e6:.2f} M parameters, {metrics['tokens_trained']:,} tokens"
    table = Table(title=title)
    for column in ("", "perplexity", "bits a byte", "ms a step", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    unigram = f"{metrics['unigram_perplexity']:.2f}", f"{metrics['unigram_bits_per_byte']:.3f}"
    table.add_row("unigram baseline", *unigram, "", "")
    for name, run in metrics["runs"].items():
        table.add_row(
            name,
            f"{run['perplexity']:.2f}",
            f"{run['bits_per_byte']:.3f}",
            f"{run['step_ms']:.1f}",
            f"{run['tokens_per_second']:,.0f}",
        )
    console.print(table)
    console.print(f"perplexity over {metrics['tokens_held_out']:,} tokens of held-out text")
    if "step_time_ratio" in metrics:
        console.print(
            f"fused against naive: the losses of a step differ by at most "
            f"{metrics['loss_difference_max']:.2e}; naive takes "
            f"{metrics['step_time_ratio']:.2f} x the time"
        )


def sample(run: Run, tokenizer: Any, held_out: Tensor, args: argparse.Namespace) -> tuple[str, str]:
    """A prompt from the held-out text and how the model goes on."""
    length = min(48, max(1, args.context // 2))
    prompt = held_out[None, :length].to(args.device)
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": args.seed}
    tokens = run.model.generate(prompt, min(240, args.context - length), **options)[0]  # type: ignore[operator]
    return tokenizer.decode(tokens[:length]), tokenizer.decode(tokens[length:])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the command line says; returns what metrics.json holds."""
    parser, args = parse(argv)
    console = Console()
    try:
        check_extras(args.tokenizer)
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer, training, held_out, held_out_bytes = prepare(args)
        runs = build_runs(args, tokenizer.vocab_size)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    except (DataError, ValueError) as error:
        parser.error(str(error))
    inputs, targets = even_windows(held_out, 32, args.context)
    bytes_per_token = held_out_bytes / len(held_out)
    unigram = unigram_loss(training, targets, tokenizer.vocab_size)
    console.print(
        f"{len(training):,} tokens to train on, {len(held_out):,} held out; "
        f"unigram perplexity {math.exp(unigram):.2f}; {args.device}, {args.dtype}"
    )
    own = ("attention", "steps", "batch", "context", "d_model", "layers", "heads", "dropout")
    settings = {name: getattr(args, name) for name in (*own, "lr", "dtype", "seed")}
    settings["data"] = hashlib.sha256(training.numpy().tobytes()).hexdigest()[:16]
    try:
        first = train(
            runs,
            lambda step: random_windows(training, args.seed, step, args.batch, args.context),
            list(zip(inputs.split(1), targets.split(1), strict=True)),
            steps=args.steps,
            peak_rate=args.lr,
            warmup=max(1, args.steps // 10),
            evaluate_every=max(1, args.steps // 5),
            save_every=args.save_every,
            checkpoint=args.out / "checkpoint.pt",
            settings=settings,
            resume=args.resume,
        )
    except DataError as error:
        parser.error(str(error))
    except Diverged as error:
        parser.exit(1, f"{error}: a lower --lr may help\n")
    if first:
        console.print(f"resumed at step {first}")

    metrics = report(args, runs, unigram, targets.numel(), bytes_per_token)
    metrics["resumed_at"] = first
    prompt, continuation = sample(runs[0], tokenizer, held_out, args)
    metrics["sample"] = {"prompt": prompt, "continuation": continuation}
    save_json(args.out / "metrics.json", metrics)
    title = f"Language model, {metrics['parameters'] / 1e6:.2f} M parameters, {args.dtype}"
    plot_losses(args.out / "loss.png", runs, {"unigram baseline": unigram}, title)
    show(console, metrics)
    console.print(Panel(Text.assemble((prompt, "dim"), continuation), title="a sample"))
    console.print(f"written to {args.out}: metrics.json, loss.png, checkpoint.pt")
    return metrics


if __name__ == "__main__":
    main()
