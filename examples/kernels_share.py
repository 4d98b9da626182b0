"""The kernels' share of each task: a training step on fused, torch's own and naive kernels.

    python examples/kernels_share.py              # under four minutes on two quiet cores
    python examples/kernels_share.py --resume     # go on after a kill
    fastattn bench --op task --full               # the table alone, as a suite of the benchmark

Times of a step take turns, so that a slow second of the machine hits everyone; peak memory is
measured in a process of its own, beyond the weights and the optimizer's state. Then each training
script runs for a few steps on fused and on naive kernels, and share.png lays their losses over each
other; `--attention fused` trains on those alone. Needs `pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import finetune
    import pretrain
    import summarise
    import train_lm
    import translate
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from training import basic_arguments, plotting, positive, positive_float, run_script
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.bench import models, tasks
from fastattn.bench.results import Result

CONTENDERS = {"ours": "fused", "torch": "torch", "naive": "naive"}
KINDS = tuple(CONTENDERS.values())


class Training(NamedTuple):
    """A training script, and what it is to leave out for its losses' sake."""

    main: Callable[[list[str]], dict[str, Any]]
    options: tuple[str, ...] = ()


FEW_OUTPUTS = ("--held-out=64", "--beams=1", "--samples=1")
TRAININGS = {
    "language model": Training(train_lm.main, ("--no-baselines",)),
    "BERT": Training(pretrain.main),
    "fine-tuning": Training(finetune.main, ("--seeds=1",)),
    "translation": Training(translate.main, FEW_OUTPUTS),
    "summary": Training(summarise.main, FEW_OUTPUTS),
}


def parser() -> argparse.ArgumentParser:
    quick = "shorter timing and fewer steps"
    parser = basic_arguments(__doc__, out="runs/share", quick=quick)
    add = parser.add_argument
    add("--seconds", type=positive_float, default=2.0, help="of timing, for each task [2]")
    add("--steps", type=positive, default=150, help="of each training, for its losses [150]")
    add("--resume", action="store_true", help="go on from the checkpoints in --out, if any")
    whose = "whose kernels train, for the losses; the table has all of them [both]"
    add("--attention", choices=("fused", "naive", "torch", "both"), default="both", help=whose)
    parser.set_defaults(quick_defaults={"seconds": 0.3, "steps": 10})
    return parser


def figures(result: Result) -> dict[str, Any]:
    """What metrics.json says of a task."""
    return {
        "step_ms": {CONTENDERS[n]: 1e3 * t["median"] for n, t in result.times.items()},
        "over_fused": {CONTENDERS[n]: r["median"] for n, r in result.ratios.items()},
        "peak_mb": {CONTENDERS[n]: mb for n, mb in result.peaks_mb.items()},
        "shape": result.shape,
        "checked": result.checked,
    }


def measure(console: Console, seconds: float) -> dict[str, Any]:
    """A training step of every task, by its name and size."""
    measured = {}
    for benchmark in tasks.BENCHMARKS:
        with console.status(f"{benchmark.task}, a training step"):
            result = models.run(benchmark, seconds)
        if result.failure:
            raise RuntimeError(f"{benchmark.id}: {result.failure}")
        name = benchmark.task.replace("_", " ")
        measured[f"{name}, {benchmark.batch} x {benchmark.length}"] = figures(result)
    return measured


def train(args: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """The losses of every training and, of both fused and naive, how far apart they are."""

    def folder(name: str) -> Path:
        return args.out / name.replace(" ", "-")

    common = [f"--attention={args.attention}", f"--steps={args.steps}", f"--seed={args.seed}"]
    if args.resume:
        common.append("--resume")
    trained = {}
    for name, training in TRAININGS.items():
        console.rule(name)
        options = [*common, *training.options, f"--out={folder(name)}"]
        if training.main is finetune.main:
            options.append(f"--pretrained={folder('BERT')}")
        metrics = training.main(options)
        if "starts" in metrics:
            metrics = metrics["starts"]["pre-trained"]["seeds"][0]
        trained[name] = {
            "losses": {
                kind: metrics["runs"][kind]["losses"] for kind in KINDS if kind in metrics["runs"]
            }
        }
        if args.attention == "both":
            trained[name] |= {
                key: metrics[key] for key in ("loss_difference_max", "step_time_ratio")
            }
    console.rule()
    return trained


def show(console: Console, metrics: dict[str, Any]) -> None:
    names = CONTENDERS.values()
    title = "A training step: ms, and MB beyond weights and optimizer"
    table = Table(title=title, box=SIMPLE, padding=(0, 0))  # within 80 columns
    table.add_column("task", min_width=16)
    for name in names:
        table.add_column(f"{name}\nms", justify="right")
    for name in list(names)[1:]:
        table.add_column(f"{name}\n/ fused", justify="right")
    for name in names:
        table.add_column(f"{name}\nMB", justify="right")
    for task, row in metrics["tasks"].items():
        cells = [f"{row['step_ms'][name]:.1f}" for name in names]
        cells += [f"{row['over_fused'][name]:.2f} x" for name in list(names)[1:]]
        cells += [f"{row['peak_mb'][n]:.0f}" if n in row["peak_mb"] else "" for n in names]
        table.add_row(task, *cells)
    console.print(table)
    for name, run in metrics["trained"].items():
        losses = next(iter(run["losses"].values()))
        first, last = losses[0], losses[-1]
        line = f"{name}: the loss falls from {first:.2f} to {last:.2f} in {len(losses)} steps"
        if "loss_difference_max" in run:
            line += (
                f"; those of fused and naive differ by at most {run['loss_difference_max']:.1e}; "
                f"naive takes {run['step_time_ratio']:.2f} x the time"
            )
        console.print(line)


def plot_losses(path: Path, trained: dict[str, dict[str, Any]]) -> None:
    with plotting(path) as axes:
        for i, (name, run) in enumerate(trained.items()):
            (kind, losses), *others = run["losses"].items()
            axes.plot(losses, color=f"C{i}", alpha=0.5, lw=2.5, label=f"{name}, {kind}")
            for other, theirs in others:
                label = "" if i else f"{other}, each"
                axes.plot(theirs, color="black", lw=0.7, ls=(0, (4, 3)), label=label)
        axes.set(xlabel="step", ylabel="training loss", title="Losses, one over the other")
        axes.figure.legend(loc="outside right upper")
        axes.grid(alpha=0.3)


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    metrics = {"tasks": measure(console, args.seconds), "trained": train(args, console)}
    plot_losses(args.out / "share.png", metrics["trained"])
    show(console, metrics)
    threads = torch.get_num_threads()
    console.print(f"{threads} threads; written to {args.out}: metrics.json, share.png")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and train as the command line says; returns what metrics.json holds."""
    needs = ["tokenizers", "sacrebleu", "rouge_score", "polib"]
    return run_script(parser(), argv, work, lambda args: needs)


if __name__ == "__main__":
    main()
