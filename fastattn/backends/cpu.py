"""The CPU backend: C++ kernels, one extension module for each instruction set."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from .base import Backend

if TYPE_CHECKING:
    from ..dispatch import Request

ISAS = ("avx512bf16", "avx512", "avx2", "neon", "baseline")  # best first


def load_extension() -> tuple[ModuleType | None, str, str]:
    """(module, instruction set, reason): the best extension that was built and runs here.

    FASTATTN_CPU_ISA names one instead; asking for one that cannot be had is an ImportError.
    """
    try:
        build_info = importlib.import_module("fastattn._build_info")
        reason = str(build_info.REASON)
        built = [isa for isa in build_info.CPU_ISAS if find_spec(f"fastattn._cpu_{isa}")]
    except ModuleNotFoundError:
        built, reason = [], ""

    wanted = os.environ.get("FASTATTN_CPU_ISA", "")
    if wanted and wanted not in ISAS:
        raise ImportError(f"FASTATTN_CPU_ISA={wanted!r}: expected one of {', '.join(ISAS)}")
    reason = reason or ("" if built else "not built: run pip install .")
    if wanted and wanted not in built:
        have = ", ".join(built) or f"none ({reason})"
        raise ImportError(f"FASTATTN_CPU_ISA={wanted!r} was not built; what was built: {have}")

    for isa in [wanted] if wanted else [isa for isa in ISAS if isa in built]:
        module = importlib.import_module(f"fastattn._cpu_{isa}")
        if module.supported():
            return module, isa, ""
    if wanted:
        raise ImportError(f"FASTATTN_CPU_ISA={wanted!r}: this CPU or its system does not have it")
    return None, "", reason or "no extension that was built runs on this CPU"


class CpuBackend(Backend):
    name = "cpu"

    def __init__(self) -> None:
        self.module, self.isa, self._unavailable = load_extension()

    def unavailable(self) -> str | None:
        return self._unavailable or None

    def detail(self) -> str:
        return self.isa

    def reasons(self, request: Request) -> list[str]:
        return [f"{request.op} is not built yet"]
