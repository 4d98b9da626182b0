"""Two runs of the benchmarks on one GPU, one a backend, to the table that dispatch chooses by:

    fastattn bench --full --device cuda --backend triton --json triton.json
    fastattn bench --full --device cuda --backend cuda --json cuda.json
    python -m fastattn.bench.choice triton.json cuda.json

writes what they show of the GPU's architecture into ``fastattn/backends/measured.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..backends import measured
from ..cases import AttentionCase
from .results import Report, Result

# Without variants: what a class stands for.
KINDS = ("full", "causal", "decode_mha", "decode_gqa", "layer_norm", "rms_norm", "softmax")


def shapes_of(result: Result) -> list[list[int]]:
    """As a request has them."""
    s = result.shape
    if result.op != AttentionCase.op:
        return [[s["rows"], s["width"]]]
    q, k = [s["B"], s["H"], s["M"], s["D"]], [s["B"], s["K"], s["N"], s["D"]]
    return [q, k, [*k[:3], s["E"]]]


def architecture(report: Report) -> str:
    capability = report.machine.get("gpu_capability")
    if not capability:
        raise ValueError("a report of a CPU: expected `fastattn bench --device cuda`")
    return f"sm_{capability.replace('.', '')}"


def times_ahead(rival: Report, ours: Report) -> dict[str, float]:
    """By class: the rival's time over ours, the least of its benchmarks, of those in both."""
    theirs = {result.id: result for result in rival.results}
    found: dict[str, float] = {}
    for result in ours.results:
        other = theirs.get(result.id)
        if result.kind not in KINDS or result.direction not in ("forward", "backward"):
            continue
        if other is None or not (result.times and other.times):
            continue
        name = measured.class_of(result.op, result.direction, result.dtype, shapes_of(result))
        ratio = other.times["ours"]["median"] / result.times["ours"]["median"]
        found[name] = min(found.get(name, ratio), ratio)
    return {name: round(ratio, 3) for name, ratio in sorted(found.items())}


def update(rival: Report, ours: Report, path: Path = measured.PATH) -> dict[str, float]:
    """The table of one architecture, which replaces what ``path`` had of it."""
    for report, name in ((rival, "triton"), (ours, "cuda")):
        others = {result.backend for result in report.results if result.backend} - {name}
        if others:
            raise ValueError(f"expected a run with --backend {name}, got {', '.join(others)}")
    arch = architecture(ours)
    if architecture(rival) != arch:
        raise ValueError(f"runs on two GPUs: {architecture(rival)} and {arch}")
    table = measured.load(path)
    table[arch] = times_ahead(rival, ours)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return table[arch]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m fastattn.bench.choice triton.json cuda.json")
        return 2
    try:
        rival, ours = (Report.load(Path(name)) for name in arguments)
        found = update(rival, ours)
    except ValueError as error:
        print(error)
        return 2
    for name, ratio in found.items():
        print(f"{ratio:6.3f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
