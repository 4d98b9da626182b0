"""What a benchmark run leaves: plain dataclasses that go to JSON and come back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass
class Result:
    """One benchmark. Times are seconds as {median, low, high, rounds} by contender.

    `ratios` is everyone's time over ours: 2.0 says that we are twice as fast.
    """

    id: str
    op: str
    kind: str
    direction: str
    dtype: str
    shape: dict[str, int]
    goal: float | None = None
    roof_goal: float | None = None  # of of_ceiling
    device: str = "cpu"
    against: str = ""  # whom the goal is against, where that is not for the times to say
    backend: str = ""
    checked: str = ""  # what the correctness check found
    failure: str = ""  # why there are no times: the check failed or the case raised
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    gflops: float = 0.0  # achieved by ours, GFLOP/s
    gbytes: float = 0.0  # GB/s of inputs and outputs, each counted once
    intensity: float = 0.0  # operations a byte
    bound: str = ""  # "compute" or "memory": the roof that is lower for this intensity
    of_ceiling: float = 0.0  # achieved over that roof
    tokens: float = 0.0  # tokens/s, of a Transformer

    @property
    def rival(self) -> str | None:
        """Whom the ratio is against: on a CPU torch's operator, or naive code where torch has none;
        on a GPU the fastest of the peers."""
        if self.against:
            return self.against if self.against in self.ratios else None
        if self.device == "cpu":
            return next((name for name in ("torch", "naive") if name in self.ratios), None)
        return min(self.ratios, key=lambda name: self.ratios[name]["median"], default=None)

    @property
    def ratio(self) -> float | None:
        """The rival's time over ours."""
        return None if self.rival is None else self.ratios[self.rival]["median"]

    @property
    def reached(self) -> bool | None:
        """All of its goals that can be told; None if there is none."""
        verdicts = []
        if self.goal is not None and self.ratio is not None:
            verdicts.append(self.ratio >= self.goal)
        if self.roof_goal is not None and self.of_ceiling:
            verdicts.append(self.of_ceiling >= self.roof_goal)
        return all(verdicts) if verdicts else None


@dataclass
class Peak:
    """Memory of one attention call beyond its inputs, in MB; `extra` is also beyond its outputs."""

    contender: str
    length: int
    dtype: str
    backward: bool
    peak_mb: float | None = None
    extra_mb: float | None = None
    seconds: float | None = None
    absent: str = ""


@dataclass
class Report:
    preset: str
    machine: dict[str, Any] = field(default_factory=dict)
    allocator: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    memory: list[Peak] = field(default_factory=list)
    host_us: dict[str, float] = field(default_factory=dict)  # of a call, by what is called
    notes: list[str] = field(default_factory=list)
    format: int = FORMAT

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """ValueError if the file is not a report of this format."""
        try:
            raw = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"{path}: not a report of `fastattn bench` (format {FORMAT})")
        raw["results"] = [Result(**entry) for entry in raw["results"]]
        raw["memory"] = [Peak(**entry) for entry in raw["memory"]]
        return cls(**raw)
