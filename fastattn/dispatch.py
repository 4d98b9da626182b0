"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from .backends import BACKENDS
from .backends.base import Backend
from .spec import RefusedType, RefusedValue


class Request(NamedTuple):
    """What a backend needs to know to say whether it serves a call."""

    op: str  # "attention", "layer_norm" or "softmax"
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[torch.Size, ...]  # attention: of q, k and v; else of the input
    flags: tuple[str, ...] = ()  # the variants in use: "bias", "dropout", "deterministic", ...
    needs_backward: bool = False


def select(name: str | None, request: Request) -> Backend:
    """The backend called ``name``, or for None the first that serves the request; before it, one
    that is known to be ahead of it.

    Raises:
        ValueError: no backend has that name, or it does not serve the request.
    """
    if name is None:
        for backend in BACKENDS.values():
            if backend.unavailable() is None and not backend.reasons(request):
                if backend.challenger and _is_ahead(backend.challenger, request):
                    return BACKENDS[backend.challenger]
                return backend
        raise RefusedValue(f"no backend serves this call:\n{_report(request)}")
    named = BACKENDS.get(name) if isinstance(name, str) else None
    if named is None:
        kind = RefusedValue if isinstance(name, str) else RefusedType
        raise kind(f"backend: expected None or one of {', '.join(BACKENDS)}, got {name!r}")
    reasons = refusals(named, request)
    if reasons:
        raise RefusedValue(f"backend: {name!r} does not serve this call: {'; '.join(reasons)}")
    return named


def _is_ahead(challenger: str, request: Request) -> bool:
    backend = BACKENDS[challenger]
    return not refusals(backend, request) and backend.ahead(request)[0]


def refusals(backend: Backend, request: Request) -> list[str]:
    """Why the backend does not serve the request; empty when it does."""
    unavailable = backend.unavailable()
    return backend.reasons(request) if unavailable is None else [unavailable]


def _report(request: Request) -> str:
    return "\n".join(
        f"{backend.name}: {'; '.join(refusals(backend, request))}" for backend in BACKENDS.values()
    )


class Explanation(NamedTuple):
    """Which backend serves a call, and one line a backend; print it."""

    backend: str
    reasons: dict[str, list[str]]  # of every known backend; empty: it could serve the call
    notes: dict[str, str] = {}  # what a backend says of whom it challenges  # noqa: RUF012

    def __repr__(self) -> str:
        lines = [f"{self.backend} serves this call"]
        for name, reasons in self.reasons.items():
            verdict = "; ".join(reasons) or ("serves it" if name == self.backend else "could too")
            detail = "; ".join(filter(None, (BACKENDS[name].detail(), self.notes.get(name))))
            if detail and not reasons:
                verdict = f"{verdict} ({detail})"
            lines.append(f"{name}: {verdict}")
        return "\n".join(lines)


def explain(name: str | None, request: Request) -> Explanation:
    """Answer for one request; ``name`` as for ``select``, with its errors."""
    return Explanation(
        select(name, request).name,
        {backend.name: refusals(backend, request) for backend in BACKENDS.values()},
        {backend.name: backend.ahead(request)[1] for backend in BACKENDS.values()},
    )


class Backends(Mapping[str, "str | None"]):
    """Every known backend by name, and why it cannot run here (None: it can); print it."""

    def __init__(self) -> None:
        self._reasons = {name: backend.unavailable() for name, backend in BACKENDS.items()}

    def __getitem__(self, name: str) -> str | None:
        return self._reasons[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def available(self) -> list[str]:
        """The names of those that run here, in order of preference."""
        return [name for name, reason in self._reasons.items() if reason is None]

    def __repr__(self) -> str:
        lines = []
        for name, reason in self._reasons.items():
            detail = BACKENDS[name].detail()
            state = "available" + (f" ({detail})" if detail else "")
            lines.append(f"{name}: {state if reason is None else f'unavailable, {reason}'}")
        return "\n".join(lines)


def backends() -> Backends:
    """The backends of this installation, in order of preference.

    A mapping from name to None, or to one line why it cannot run here::

        >>> fastattn.backends()
        cpu: available (avx2)
        triton: unavailable, needs a CUDA or HIP device (torch sees none)
        cuda: unavailable, needs an NVIDIA GPU (torch sees none)
        reference: available (naive PyTorch)
    """
    return Backends()
