"""The CPU backend: C++ kernels, one extension module for each instruction set."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import (
    AttentionCall,
    Backend,
    Needs,
    bias_gradient_shape,
    empty_output,
    sink_gradient,
    statistics_dtype,
)
from .extension import show_tensors
from .row_kernels import RowKernels

if TYPE_CHECKING:
    from ..dispatch import Request

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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

    if built:
        # Only the plainest module may be imported before it is known what this processor runs.
        usable = importlib.import_module(
            f"fastattn._cpu_{max(built, key=ISAS.index)}"
        ).usable_isas()
        for isa in [wanted] if wanted else [isa for isa in ISAS if isa in built]:
            if isa in usable:
                module = importlib.import_module(f"fastattn._cpu_{isa}")
                obstacle = show_tensors(module)
                return (None, "", obstacle) if obstacle else (module, isa, "")
    if wanted:
        raise ImportError(f"FASTATTN_CPU_ISA={wanted!r}: this CPU or its system does not have it")
    return None, "", reason or "no extension that was built runs on this CPU"


class CpuBackend(RowKernels, Backend):
    name = "cpu"

    def __init__(self) -> None:
        self.module, self.isa, self._unavailable = load_extension()

    def unavailable(self) -> str | None:
        return self._unavailable or None

    def detail(self) -> str:
        return self.isa

    def launch_arguments(self) -> tuple[Any, ...]:
        return (torch.get_num_threads(),)

    def reasons(self, request: Request) -> list[str]:
        reasons = []
        # Devices compare faster than they tell their type.
        if request.device != CPU and request.device.type != "cpu":
            reasons.append(f"needs a CPU tensor (got {request.device.type})")
        if request.dtype not in DTYPES:
            reasons.append(f"serves float32, float64, bfloat16 and float16 (got {request.dtype})")
        return reasons

    def multiply_add_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of bare multiply-adds on every thread; 0 if nothing was compiled."""
        if self.module is None:
            return 0.0
        rate = self.module.multiply_add_rate(torch.ones(1, dtype=dtype), torch.get_num_threads())
        return float(rate)

    def attention_forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        q = call.q
        batch, heads, length, _ = q.shape
        out = empty_output(q, call.v.shape[3])
        # Sizes one by one: torch takes half as long again to read a tuple.
        lse = torch.empty(batch, heads, length, dtype=statistics_dtype(q.dtype))
        lse_low = torch.empty_like(lse) if call.for_backward else None
        self.module.attention_forward(call, out, lse, lse_low, torch.get_num_threads())
        return out, lse, lse_low

    def attention_backward(
        self,
        call: AttentionCall,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_low: Tensor | None,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        bias, sinks = call.bias, call.sinks
        # With no keys, or no queries, nothing is summed and nothing written.
        new = torch.zeros_like if 0 in (*call.q.shape, *call.k.shape) else torch.empty_like
        dq, dk, dv = (
            new(tensor) if need else None
            for tensor, need in zip((call.q, call.k, call.v), needs, strict=False)
        )
        dbias = None
        if bias is not None and needs[3]:
            dbias = lse.new_zeros(bias_gradient_shape(bias))  # zeros: whole tiles may be masked
        delta = torch.empty_like(lse)
        if dlse is not None:
            dlse = dlse.to(lse.dtype).contiguous()
        outputs = (delta, dq, dk, dv, dbias)
        results, threads = (out, lse, lse_low), torch.get_num_threads()
        self.module.attention_backward(call, results, dout, dlse, outputs, threads)
        dsinks = None
        if sinks is not None and needs[4]:
            dsinks = sink_gradient(sinks, lse, lse_low, delta, dlse)
        if bias is not None and dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dq, dk, dv, dbias, dsinks
