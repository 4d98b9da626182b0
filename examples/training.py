"""What the training examples share: a command line, a training loop that survives a kill, a plot.

Reading order: the command line (`arguments`, `run_script`), models by it (`transformer_config`,
`build_runs`), the loop (`Run`, `fit`), what a run leaves (`compare`, checkpoints, `plot_losses`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from data import DataError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fastattn.models import TransformerConfig

# (mean loss, over how many targets), and where there is more to count on held-out data, a tally of
# it: {"accuracy": (right, of how many), ...}
Loss = Callable[[nn.Module, Any], tuple[Any, ...]]


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


# ------------------------------------------------------------------------------ the command line

# arguments that may differ between a run and its continuation
NEUTRAL = {"quick", "data", "device", "out", "resume", "save_every"}


DATA_HELP = "a text file or a folder of them, in place of what Python brings"
CHECKPOINT_HELP = "[runs/lm/checkpoint.pt; where that is not, a tiny model is trained first]"


def basic_arguments(
    description: str, *, out: str, quick: str, **defaults: Any
) -> argparse.ArgumentParser:
    """The arguments that every script has."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help=quick)
    add("--seed", type=seed, default=0)
    add("--out", type=Path, default=Path(out), help=f"where results go [{out}]")
    parser.set_defaults(quick_defaults={}, **defaults)
    return parser


def model_arguments(
    description: str, *, out: str, quick: str, **defaults: Any
) -> argparse.ArgumentParser:
    """The arguments of a script that runs a model."""
    parser = basic_arguments(description, out=out, quick=quick, **defaults)
    kinds = ("fused", "naive", "torch", "both")
    whose = "whose kernels; both: fused and naive [fused]"
    parser.add_argument("--attention", choices=kinds, default="fused", help=whose)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable, default=here, help=f"[{here}]")
    return parser


def arguments(
    description: str, task: str, *, data_help: str = DATA_HELP, **defaults: Any
) -> argparse.ArgumentParser:
    """The arguments that every training script has, with `defaults` of the script's own for them.

    `task` names what is learned: the results go to runs/TASK, and a checkpoint knows whose it is. A
    script adds its own arguments with `parser.add_argument`, and names what --quick changes with
    `parser.set_defaults(quick_defaults={...})`.
    """
    quick = "fused and naive side by side, in under a minute"
    parser = model_arguments(description, out=f"runs/{task}", quick=quick, task=task)
    add = parser.add_argument
    add("--data", type=Path, help=data_help)
    add("--steps", type=positive, default=600, help="[%(default)s]")
    add("--batch", type=positive, default=8, help="sequences a step [%(default)s]")
    add("--d-model", type=positive, default=128, help="width of the model [%(default)s]")
    add("--layers", type=positive, default=3, help="[%(default)s]")
    add("--heads", type=positive, default=2, help="[%(default)s]")
    dropout = "0 with --attention both, unless it is named [%(default)s]"
    add("--dropout", type=fraction, default=0.0, help=dropout)
    add("--lr", type=positive_float, default=2e-3, help="the highest learning rate [%(default)s]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    add("--save-every", type=positive, default=100, help="steps between checkpoints [%(default)s]")
    parser.set_defaults(quick_defaults={"attention": "both"}, **defaults)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.quick:  # presets are defaults, so whatever is named beside --quick holds
        parser.set_defaults(**args.quick_defaults)
        args = parser.parse_args(argv)
    if "dropout" in args and args.attention == "both":
        parser.set_defaults(dropout=0.0)  # each would draw its own, and the losses part
        args = parser.parse_args(argv)
    del args.quick_defaults
    return args


def run_script(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace, Console], dict[str, Any]],
    needs: Callable[[argparse.Namespace], Sequence[str]] = lambda args: (),
) -> dict[str, Any]:
    """Parse, do the work, write its figures to metrics.json in --out, and return them.

    `needs` names the optional packages of the work: a missing one is said before the work begins.
    What a user can mend ends with one line and exit status 2, a loss that diverged with 1.
    """
    args = parse(parser, argv)
    try:
        check_extras("matplotlib", *needs(args))
        make_folder(args.out)
        metrics = work(args, Console())
        named = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        metrics = {"arguments": named, "torch": torch.__version__, **metrics}
        metrics["threads"] = torch.get_num_threads()
        save_json(args.out / "metrics.json", metrics)
    except DataError as error:
        parser.error(str(error))
    except Diverged as error:
        parser.exit(1, f"{error}: a lower --lr may help\n")
    return metrics


def number(kind: type, what: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type of an argument: a number that something holds of."""

    def parsed(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {what}, got {text}")

    return parsed


positive = number(int, "a positive integer", lambda n: n >= 1)
natural = number(int, "an integer of at least 0", lambda n: n >= 0)
seed = number(int, "an integer from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
positive_float = number(float, "a positive number", lambda x: 0.0 < x < math.inf)
finite = number(float, "a finite number", math.isfinite)
fraction = number(float, "in [0, 1)", lambda x: 0.0 <= x < 1.0)


def usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for want of CUDA
        raise argparse.ArgumentTypeError(f"{device}: {str(error).splitlines()[0]}") from None
    return device


def check_extras(*needed: str) -> None:
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise DataError(f"needs {' and '.join(missing)}: pip install 'fastattn[examples]'")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {path}: {error.strerror}") from error


# ----------------------------------------------------------------------- models by command line


def transformer_config(args: argparse.Namespace, **fields: Any) -> TransformerConfig:
    """The configuration that the arguments and `fields` ask for; DataError if there is none."""
    asked = {
        "d_model": args.d_model,
        "n_heads": args.heads,
        "n_layers": args.layers,
        "dropout": args.dropout,
        **fields,
    }
    try:
        return TransformerConfig(**asked)
    except ValueError as error:
        raise DataError(str(error)) from error


def attentions(args: argparse.Namespace) -> tuple[str, ...]:
    return ("fused", "naive") if args.attention == "both" else (args.attention,)


def build_runs(
    args: argparse.Namespace, build: Callable[[str], nn.Module], loss: Loss
) -> list[Run]:
    """A run for each kind of attention, all from the same initial weights."""
    runs = []
    for attention in attentions(args):
        torch.manual_seed(args.seed)
        runs.append(Run(attention, build(attention).to(args.device), loss, args.lr))
    return runs


def computing(args: argparse.Namespace) -> Any:
    """The block in which a model runs in --dtype."""
    dtype = getattr(torch, args.dtype)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


# -------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


def adamw(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); matrices decay, vectors do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class Run:
    """One model in training, and what it has been through."""

    def __init__(self, name: str, model: nn.Module, loss: Loss, peak_rate: float):
        self.name, self.model, self.loss, self.peak_rate = name, model, loss, peak_rate
        self.optimizer = adamw(model)
        self.losses: list[float] = []  # of each step
        self.seconds: list[float] = []  # of each step
        self.held_out: list[tuple[int, float]] = []  # (steps done, loss)
        self.scores: dict[str, list[float]] = {}  # what the loss tallies, at the same steps

    def step(self, batch: Any, rate: float) -> None:
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.model, batch)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        if loss.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any]) -> float:
        """The mean loss over all targets of the batches; what the loss tallies goes to `scores`."""
        self.model.eval()
        total, targets = 0.0, 0
        tallies: dict[str, tuple[float, int]] = {}
        for batch in batches:
            loss, count, *more = self.loss(self.model, batch)
            total, targets = total + loss.item() * count, targets + count
            for name, (right, of) in (more[0] if more else {}).items():
                before = tallies.get(name, (0.0, 0))
                tallies[name] = before[0] + float(right), before[1] + of
        self.model.train()
        for name, (right, of) in tallies.items():
            self.scores.setdefault(name, []).append(right / of)
        return total / targets

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "held_out": self.held_out,
            "scores": self.scores,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.held_out = [(step, loss) for step, loss in state["held_out"]]
        self.scores = state.get("scores", {})


def fit(
    args: argparse.Namespace,
    runs: list[Run],
    batch_at: Callable[[int], Any],
    held_out: Sequence[Any],
    data: str,
    name: str = "checkpoint",
    tokenizer: str = "",
) -> int:
    """Train the runs side by side, as the command line says, each step on the same batch, in turn:
    what slows the machine down for a moment slows all of them. Returns the step it started from.

    The checkpoint has the models, optimizers, losses, torch's random state and the step, and is
    replaced in one piece, so that a run killed at any moment continues with --resume as if nothing
    had happened. `data` is a fingerprint of what is learned from: DataError where the checkpoint is
    of other data, or of other arguments. For those who will use the model, it has the `tokenizer`
    too, as JSON.
    """
    settings = {k: v for k, v in vars(args).items() if k not in NEUTRAL}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    settings["data"] = data
    checkpoint = args.out / f"{name}.pt"
    steps, warmup, evaluate_every = args.steps, max(1, args.steps // 10), max(1, args.steps // 5)
    first = load_checkpoint(checkpoint, runs, settings) if args.resume else 0
    with progress_bar() as progress:
        task = progress.add_task("training", total=steps, completed=first, status="")
        for step in range(first, steps):
            batch = batch_at(step)
            for run in runs if step % 2 else reversed(runs):
                run.step(batch, learning_rate(step, steps, run.peak_rate, warmup))
                check_finite(run, step, run.losses[-1])
            done = step + 1
            if done % evaluate_every == 0 or done == steps:
                for run in runs:
                    run.held_out.append((done, run.evaluate(held_out)))
                    check_finite(run, step, run.held_out[-1][1])
            if done % args.save_every == 0 or done == steps:
                save_checkpoint(checkpoint, runs, done, settings, tokenizer)
            progress.update(task, advance=1, status=describe(runs))
    return first


def check_finite(run: Run, step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"{run.name}: the loss at step {step + 1} is {loss}")


def describe(runs: list[Run]) -> str:
    status = f"loss {runs[0].losses[-1]:.3f}"
    if runs[0].held_out:
        status += f", held out {runs[0].held_out[-1][1]:.3f}"
    times = (f"{run.name} {1e3 * median(run.seconds[-50:]):.0f}" for run in runs)
    return f"{status}, ms a step: {', '.join(times)}"


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond lies an OverflowError


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


# --------------------------------------------------------------------- what a run leaves behind


def compare(runs: list[Run]) -> dict[str, Any]:
    """Figures of each run, and of fused against naive where both were trained."""
    figures: dict[str, Any] = {
        run.name: {
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "perplexity": perplexity(run.held_out[-1][1]),
            "step_ms": 1e3 * median(run.seconds),
            "training_seconds": sum(run.seconds),
            "losses": run.losses,
            "held_out": run.held_out,
            **({"scores": run.scores} if run.scores else {}),
        }
        for run in runs
    }
    named = {run.name: run for run in runs}
    metrics: dict[str, Any] = {"runs": figures}
    if {"fused", "naive"} <= named.keys():
        fused, naive = named["fused"], named["naive"]
        differences = [abs(a - b) for a, b in zip(fused.losses, naive.losses, strict=True)]
        metrics["loss_difference_max"] = max(differences)
        metrics["loss_difference"] = differences
        # of the two times of a step, so that both had the machine in the same state
        ratios = [b / a for a, b in zip(fused.seconds, naive.seconds, strict=True)]
        metrics["step_time_ratio"] = median(ratios)
    return metrics


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (0 of a single value, which shows none)."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def show_comparison(console: Console, metrics: dict[str, Any]) -> None:
    if "step_time_ratio" in metrics:
        console.print(
            f"fused against naive: the losses of a step differ by at most "
            f"{metrics['loss_difference_max']:.2e}; naive takes "
            f"{metrics['step_time_ratio']:.2f} x the time"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is written, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(
    path: Path, runs: list[Run], step: int, settings: dict[str, Any], tokenizer: str
) -> None:
    state = {
        "settings": settings,
        "tokenizer": tokenizer,
        "step": step,
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "runs": {run.name: run.state() for run in runs},
    }
    with replacing(path) as partial:
        torch.save(state, partial)


def read_checkpoint(path: Path, *tasks: str) -> dict[str, Any]:
    """What `save_checkpoint` wrote in training for one of the tasks; DataError if it is something
    else."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["settings"]["task"]
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"{path} is not a checkpoint of these examples") from error
    if found not in tasks:
        raise DataError(f"{path} is a checkpoint of the task {found}, not {' or '.join(tasks)}")
    return state


def load_checkpoint(path: Path, runs: list[Run], settings: dict[str, Any]) -> int:
    """Put the runs back where the checkpoint has them; the steps done, 0 when there is none."""
    if not path.exists():
        return 0
    state = read_checkpoint(path, settings["task"])
    saved = state["settings"]
    changed = [k for k in sorted({*saved, *settings}) if saved.get(k) != settings.get(k)]
    if changed:
        differences = ", ".join(f"{k}: {saved.get(k)} then, {settings.get(k)} now" for k in changed)
        raise DataError(f"{path} is of another run ({differences}): change --out, or do not resume")
    for run in runs:
        run.load(state["runs"][run.name])
    torch.set_rng_state(state["random"])
    if state["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_random"])
    return state["step"]


def save_json(path: Path, value: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def plotting(path: Path, **size: Any) -> Iterator[Any]:
    """matplotlib's axes of a picture that is written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(**{"figsize": (8, 4.5), "layout": "constrained", **size})
    try:
        yield axes
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=120)
    finally:
        plt.close(figure)


def plot_losses(path: Path, runs: list[Run], lines: dict[str, float], title: str) -> None:
    """Training losses as lines, held-out losses as points, `lines` as dashed levels."""
    with plotting(path) as axes:
        for i, run in enumerate(runs):
            dashes = {"linestyle": (0, (4, 3))} if i else {}  # equal curves both stay visible
            axes.plot(run.losses, color=f"C{i}", label=f"{run.name}, training", lw=1.2, **dashes)
            steps, losses = zip(*run.held_out, strict=True)
            marker = "ox^v"[i % 4]
            axes.plot(steps, losses, marker, color=f"C{i}", label=f"{run.name}, held-out")
        for name, level in lines.items():
            axes.axhline(level, color="gray", linestyle=":", label=name)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
        axes.legend()
        axes.grid(alpha=0.3)
