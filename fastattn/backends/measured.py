"""Where a benchmark shows the cuda backend ahead of triton: ``measured.json``, which
``python -m fastattn.bench.choice`` writes, by architecture and by class of call.

The number is triton's time over cuda's, the least of the class's benchmarks. A class that nobody
measured is not in it, and triton, which comes first in the order, keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

PATH = Path(__file__).with_name("measured.json")
Table = Mapping[str, Mapping[str, float]]  # architecture -> class -> times ahead


def load(path: Path = PATH) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = json.loads(path.read_text())
    return table


def class_of(op: str, direction: str, dtype: str, shapes: Sequence[Sequence[int]]) -> str:
    """The class of a call: op, direction, dtype and about how large; shapes as in ``Request``."""
    if op == "attention":
        q, k, v = shapes
        head_dim = max(q[3], v[3])
        bucket = next((n for n in (64, 128) if head_dim <= n), 256)
        length = "decode" if q[2] <= 16 else "short" if k[2] < 2048 else "long"
        size = f"head_dim_{bucket}/{length}"
    else:
        width = shapes[0][-1] if len(shapes[0]) else 1
        size = "narrow" if width <= 1024 else "wide" if width <= 16384 else "widest"
    return f"{op}/{direction}/{dtype}/{size}"


def is_ahead(
    table: Table,
    arch: str,
    op: str,
    dtype: str,
    shapes: Sequence[Sequence[int]],
    needs_backward: bool,
) -> bool:
    """Whether everything that the call will run was measured, and came out ahead."""
    times = table.get(arch)
    if not times:
        return False
    directions = ("forward", "backward") if needs_backward else ("forward",)
    return all(
        times.get(class_of(op, direction, dtype, shapes), 0.0) > 1.0 for direction in directions
    )
