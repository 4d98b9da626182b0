"""The command line: fastattn info | check | bench | tune."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__
from .console import BAD, DIM, GOOD, Cell, Console


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="fastattn", description="Fused kernels for PyTorch.")
    root.add_argument("--version", action="version", version=f"fastattn {__version__}")
    commands = root.add_subparsers(
        dest="command", required=True, metavar="info | check | bench | tune"
    )

    commands.add_parser("info", help="this machine, what was built, which backends run here")

    check = commands.add_parser("check", help="prove every backend here against the reference")
    check.add_argument("--op", choices=("attention", "layer_norm", "softmax"))
    check.add_argument("--backend", help="only this backend")
    check.add_argument("--verbose", action="store_true", help="a line for every case")

    bench = commands.add_parser("bench", help="time our kernels against PyTorch's")
    preset = bench.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="about 2 minutes on 2 cores [default]")
    preset.add_argument("--full", action="store_true", help="every shape, and longer timing")
    ops = ("attention", "layer_norm", "softmax", "transformer", "task", "gpt2")
    bench.add_argument("--op", choices=ops)
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    bench.add_argument("--case", metavar="PATTERN", help="part of an id, or a pattern with *")
    bench.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda (or HIP): other shapes, peers and goals; figures go to benchmarks/results [cpu]",
    )
    bench.add_argument("--backend", help="time this backend instead of the best one")
    bench.add_argument("--threads", type=positive, help="threads for everyone [torch's own]")
    bench.add_argument("--flex", action="store_true", help="FlexAttention too in the quick suite")
    bench.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    bench.add_argument("--html", type=Path, metavar="PATH", help="write a page with plots there")
    bench.add_argument("--compare", type=Path, metavar="OLD.json", help="show what moved")
    bench.add_argument("--list", action="store_true", help="print what would run, and stop")

    tune = commands.add_parser("tune", help="search the fastest Triton configurations for this GPU")
    tune.add_argument("--op", choices=("attention", "layer_norm", "softmax"))
    return root


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for a failed check or benchmark, 2 for a wrong command line."""
    options = parser().parse_args(arguments)
    commands = {"info": info, "check": check, "bench": bench, "tune": tune}
    return commands[options.command](options)


def info(options: argparse.Namespace) -> int:
    import fastattn

    from .backends import BACKENDS
    from .bench import machine, overhead

    console = Console()
    facts = machine.describe()
    memory = f", {facts['memory_gb']:.0f} GB" if facts["memory_gb"] else ""
    console.pairs(
        "Machine",
        [
            ("CPU", facts["cpu"]),
            ("cores", f"{facts['cores']}, torch uses {facts['threads']} threads{memory}"),
            ("instructions", " ".join(facts["flags"]) or "unknown"),
            ("GPU", facts["gpu"] or "none that torch can use"),
            ("system", facts["platform"]),
        ],
    )
    console.pairs(
        "Versions",
        [
            ("fastattn", f"{facts['fastattn']}, commit {facts['commit'] or 'unknown'}"),
            ("torch", f"{facts['torch']} ({facts['torch_cpu_capability']})"),
            ("python", facts["python"]),
        ],
    )
    built = machine.build_record()
    console.pairs(
        "Built at install",
        [
            ("CPU extensions", ", ".join(built["isas"]) or f"none: {built['reason']}"),
            ("compiler", built["compiler"] or "unknown"),
            ("run here", ", ".join(built["usable"]) or "none"),
            ("forced", os.environ.get("FASTATTN_CPU_ISA") or "no (FASTATTN_CPU_ISA)"),
        ],
    )
    rows: list[tuple[str, Cell]] = []
    for name, reason in fastattn.backends().items():
        if reason is None:
            rows.append((name, (f"available: {BACKENDS[name].detail()}", GOOD)))
        else:
            rows.append((name, (f"unavailable: {reason}", BAD)))
    console.pairs("Backends, first choice first", rows)
    overhead.show(console)
    console.line("fastattn.explain(q, k, v, ...) says which one serves a call, and why.", DIM)
    return 0


def check(options: argparse.Namespace) -> int:
    from . import proof

    return proof.check(Console(), options.op, options.backend, options.verbose)


def bench(options: argparse.Namespace) -> int:
    from .bench import command

    return command.bench(Console(), options)


def tune(options: argparse.Namespace) -> int:
    from .backends import BACKENDS

    console = Console()
    if reason := BACKENDS["triton"].unavailable():
        console.line(f"fastattn tune: nothing to tune: triton: {reason}", BAD)
        return 1
    import torch

    from .backends.triton import tune
    from .bench import overhead

    status = tune.tune(console, options.op)
    if torch.cuda.is_available():  # else it has said why there is nothing to tune
        overhead.show(console, torch.device("cuda", torch.cuda.current_device()))
    return status


if __name__ == "__main__":
    sys.exit(main())
