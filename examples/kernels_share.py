"""The kernels' share of each task: a training step on fused, torch's own and naive kernels.

    python examples/kernels_share.py              # about a minute on two quiet cores
    fastattn bench --op task --full               # the same figures as a suite of the benchmark

Times take turns, so that a slow second of the machine hits everyone; peak memory is measured in a
process of its own, beyond the weights and the optimizer's state. Where the training scripts have
left fused and naive loss curves in --runs (`--attention both`), share.png overlays them, and the
table says how far apart they are. Needs `pip install fastattn[examples]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from data import DataError
    from rich.console import Console
    from rich.table import Table
    from training import basic_arguments, plotting, positive_float, run_script
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fastattn[examples]'") from None

from fastattn.bench import models, tasks
from fastattn.bench.results import Result

CONTENDERS = {"ours": "fused", "torch": "torch", "naive": "naive"}


def parser() -> argparse.ArgumentParser:
    parser = basic_arguments(__doc__, out="runs/share", quick="shorter timing")
    add = parser.add_argument
    add("--seconds", type=positive_float, default=2.0, help="of timing, for each task [2]")
    add("--task", action="append", choices=sorted({b.task for b in tasks.BENCHMARKS}), help="[all]")
    add("--runs", type=Path, default=Path("runs"), help="where training scripts left theirs [runs]")
    parser.set_defaults(quick_defaults={"seconds": 0.3})
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


def loss_curves(folder: Path) -> dict[str, dict[str, Any]]:
    """By the name of its folder, what each training with both kernels left."""
    found = {}
    for path in sorted(folder.glob("*/metrics.json")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        if "loss_difference_max" in metrics:
            found[path.parent.name] = metrics
    return found


def show(console: Console, metrics: dict[str, Any]) -> None:
    names = CONTENDERS.values()
    table = Table(title="A training step: ms, and MB beyond weights and optimizer")
    table.add_column("task")
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
        table.add_row(task.replace("_", " "), *cells)
    console.print(table)
    for name, run in metrics["trained"].items():
        console.print(
            f"{name}: over {run['steps']} steps the losses of fused and naive differ by at most "
            f"{run['loss_difference_max']:.1e}; naive took {run['step_time_ratio']:.2f} x the time"
        )


def plot_curves(path: Path, curves: dict[str, dict[str, Any]]) -> None:
    with plotting(path) as axes:
        for i, (name, metrics) in enumerate(curves.items()):
            fused, naive = (metrics["runs"][kind]["losses"] for kind in ("fused", "naive"))
            axes.plot(fused, color=f"C{i}", alpha=0.5, lw=2.5, label=f"{name}, fused")
            axes.plot(naive, color="black", lw=0.7, ls=(0, (4, 3)), label=f"{name}, naive")
        axes.set(xlabel="step", ylabel="training loss", title="Fused and naive, one over the other")
        axes.legend()
        axes.grid(alpha=0.3)


def work(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    curves = loss_curves(args.runs)
    measured = {}
    for benchmark in tasks.BENCHMARKS:
        if args.task and benchmark.task not in args.task:
            continue
        with console.status(f"{benchmark.task}, a training step"):
            result = models.run(benchmark, args.seconds)
        if result.failure:
            raise RuntimeError(f"{benchmark.id}: {result.failure}")
        measured[f"{benchmark.task}, {benchmark.batch} x {benchmark.length}"] = figures(result)
    kept = ("loss_difference_max", "step_time_ratio")
    trained = {
        name: {"steps": len(m["loss_difference"]), **{key: m[key] for key in kept}}
        for name, m in curves.items()
    }
    metrics = {"tasks": measured, "trained": trained}
    show(console, metrics)
    if curves:
        plot_curves(args.out / "share.png", curves)
    else:
        console.print(f"no loss curves: nothing in {args.runs} was trained with --attention both")
    console.print(f"{torch.get_num_threads()} threads; written to {args.out}")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure as the command line says; returns what metrics.json holds."""
    return run_script(parser(), argv, work)


if __name__ == "__main__":
    main()
