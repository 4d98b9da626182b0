"""Peak memory of attention against sequence length.

Run as a program (`python -m fastattn.bench.memory`, the jobs as JSON on stdin) it forks once for
each measurement, so that none sees another's leftovers, and prints a line of JSON for each. The
peak is the kernel's own high-water mark (VmHWM), reset just before the call: exact, and blind to
nothing that a sampling thread might miss.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import child
from ..cases import AttentionCase
from . import allocator
from .contenders import NAIVE, OURS, TORCH, forwards
from .results import Peak
from .timing import Call

HEADS, HEAD_DIM = 8, 64
LONGEST = 16384


def jobs(full: bool) -> list[Peak]:
    """What to measure, as peaks without numbers."""
    lengths = (1024, 2048, 4096, 8192, LONGEST) if full else (1024, 2048, 4096)
    forward = [Peak(c, s, "float32", False) for s in lengths for c in (OURS, TORCH, NAIVE)]
    backward = [
        Peak(c, s, "float32", True)
        for s in (lengths[:4] if full else lengths[:2])
        for c in (OURS, TORCH, NAIVE)
    ]
    return forward + backward


def measure(planned: list[Peak], threads: int, backend: str | None) -> Iterator[Peak]:
    """The peaks, one by one, from a child process with the allocator as users have it."""
    if not measurable():
        for peak in planned:
            peak.absent = "peak memory is read from /proc (Linux)"
            yield peak
        return
    request = {"threads": threads, "backend": backend, "jobs": [asdict(p) for p in planned]}
    for answer in child.answers("fastattn.bench.memory", request, default_environment()):
        yield Peak(**answer)


def measurable() -> bool:
    """Whether this system tells a process's high-water mark."""
    return Path("/proc/self/clear_refs").exists()


def default_environment() -> dict[str, str]:
    """This process's environment without what would tune the allocator."""
    tuning = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if not name.startswith(tuning)}


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def _case(peak: Peak, length: int) -> AttentionCase:
    dtype = getattr(torch, peak.dtype)
    return AttentionCase(
        f"memory_s{length}",
        batch=1,
        heads=HEADS,
        q_len=length,
        head_dim=HEAD_DIM,
        causal=True,
        return_lse=False,
        dtype=dtype,
    )


def high_water_mb(call: Call) -> float:
    """MB that this process held at most during a call, beyond what it held before."""
    allocator.trim()
    before = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    call()
    return _status_mb("VmHWM") - before


def _call(peak: Peak, length: int, backend: str | None) -> tuple[float, float, float]:
    """(peak over inputs in MB, bytes of the outputs in MB, seconds) of one call."""
    inputs = _case(peak, length).make_inputs(requires_grad=peak.backward)
    forward = forwards(_case(peak, length), inputs, backend)[peak.contender]
    outputs: list[Tensor] = []
    seconds = 0.0

    def call() -> None:
        nonlocal seconds
        start = time.perf_counter()
        with torch.set_grad_enabled(peak.backward):
            outputs.append(forward())
        if peak.backward:
            outputs.extend(torch.autograd.grad(outputs[0].sum(), list(inputs.values())))
        seconds = time.perf_counter() - start

    high = high_water_mb(call)
    return high, sum(t.nbytes for t in outputs) / 1e6, seconds


def _fill(peak: Peak, backend: str | None) -> Peak:
    copies = 8 if peak.backward else 4  # of the S x S matrix that naive code holds at once
    needed = copies * HEADS * peak.length**2 * getattr(torch, peak.dtype).itemsize / 1e6
    if peak.contender == NAIVE and needed > 0.8e-6 * allocator.available_memory():
        peak.absent = f"would need about {needed / 1e3:.0f} GB"
        return peak
    _call(peak, 64, backend)  # threads, workspaces and code are there before the clock starts
    high, outputs, seconds = _call(peak, peak.length, backend)
    peak.peak_mb, peak.extra_mb, peak.seconds = high, max(0.0, high - outputs), seconds
    return peak


def fork_each(
    jobs: Iterable[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Prints what ``work`` makes of each job in a process of its own, as a line of JSON; of one
    that failed or was killed, the job and the reason as "absent"."""
    for job in jobs:
        # The parent runs no kernel itself: a fork after threads have started would hang.
        process = os.fork()
        if process == 0:
            try:
                answer = work(job)
            except Exception as error:
                answer = job | {"absent": str(error) or type(error).__name__}
            print(json.dumps(answer), flush=True)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if status:
            gone = job | {"absent": f"the process was killed (status {status})"}
            print(json.dumps(gone), flush=True)


def main() -> None:
    request = json.load(sys.stdin)

    def work(job: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request["threads"])
        return asdict(_fill(Peak(**job), request["backend"]))

    fork_each(request["jobs"], work)


if __name__ == "__main__":
    main()
