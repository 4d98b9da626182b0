"""The CUDA backend: C++ kernels for NVIDIA GPUs from sm_80 on.

There where nvcc was at install (``fastattn._cuda``). The tests hand it a module that runs the same
kernels in an emulator, on tensors in the CPU's memory.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import measured
from .base import (
    AttentionCall,
    Backend,
    LayerNormCall,
    Needs,
    bias_gradient_shape,
    empty_output,
    sink_gradient,
)
from .extension import show_tensors
from .row_kernels import RowKernels

if TYPE_CHECKING:
    from ..dispatch import Request

ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *ATTENTION_DTYPES)
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
OLDEST = (8, 0)
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30  # of queries and of keys
MAX_BLOCKS = 2**31 - 1  # of a grid
SMALLEST_TILE = 32


def load_extension() -> tuple[ModuleType | None, str]:
    """(module, why there is none)"""
    try:
        module = importlib.import_module("fastattn._cuda")
        obstacle = show_tensors(module)
        return (None, obstacle) if obstacle else (module, "")
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        return None, f"its module cannot be imported: {error}"
    try:
        reason = str(importlib.import_module("fastattn._build_info").CUDA_REASON)
    except (ModuleNotFoundError, AttributeError):
        reason = ""
    return None, f"not built: {reason or 'run pip install . where there is nvcc'}"


class CudaBackend(RowKernels, Backend):
    name = "cuda"

    def __init__(self, module: ModuleType | None = None) -> None:
        self._unavailable: str | None = None
        self.emulated = module is not None
        if module is None:
            module, reason = load_extension()
            self._unavailable = reason or None  # the device is looked for when somebody asks
        else:
            self._unavailable = show_tensors(module)
        self.module: Any = module
        self._emulated_limits = module.limits(0) if module and self.emulated else ()
        self._measured = measured.load() if module else {}
        # What a block of attention needs, read now: reasons() may run under torch.compile.
        self._head_dims = [
            (n, module.attention_shared_bytes(n) if module else 1)
            for n in range(32, MAX_HEAD_DIM + 1, 32)
        ]

    @property
    def device(self) -> str:
        return "cpu" if self.emulated else "cuda"

    def unavailable(self) -> str | None:
        if self._unavailable is None:
            self._unavailable = _no_device()
        return self._unavailable or None

    def detail(self) -> str:
        if self.unavailable():
            return ""
        return "emulator" if self.emulated else torch.cuda.get_device_name()

    def reasons(self, request: Request) -> list[str]:
        reasons = []
        if request.device.type != self.device:
            reasons.append(f"needs a CUDA tensor (got {request.device.type})")
        if request.op == "attention":
            if request.dtype not in ATTENTION_DTYPES:
                reasons.append(f"serves attention in bfloat16 and float16 (got {request.dtype})")
            reasons += self._head_dim_reasons(request)
            if request.device.type == self.device:
                reasons += _size_reasons(request)
        elif request.dtype not in DTYPES:
            reasons.append(f"serves float32, bfloat16 and float16 (got {request.dtype})")
        return reasons

    def ahead(self, request: Request) -> tuple[bool, str]:
        if request.device.type != self.device or self.unavailable():
            return False, ""
        arch = f"sm_{self._limits(request.device)[2]}"
        # What was measured had no variants.
        if not request.flags and measured.is_ahead(
            self._measured,
            arch,
            request.op,
            DTYPE_NAMES[request.dtype],
            request.shapes,
            request.needs_backward,
        ):
            return True, f"a benchmark on {arch} shows it ahead of triton"
        return False, f"no benchmark on {arch} shows it ahead of triton"

    def _head_dim_reasons(self, request: Request) -> list[str]:
        head_dim = max(shape[3] for shape in request.shapes)
        needed = 0
        for most, shared_bytes in self._head_dims:
            if head_dim <= most:
                needed = shared_bytes
                break
        if not needed:
            return [f"serves head dims up to {MAX_HEAD_DIM} (got {head_dim})"]
        if request.device.type != self.device or self.unavailable():
            return []
        have = self._limits(request.device)[0]
        if needed <= have:
            return []
        return [
            f"head dim {head_dim} needs {needed} bytes of shared memory a block (here are {have})"
        ]

    def _limits(self, device: torch.device) -> tuple[int, int, int]:
        """(shared memory that a block may have, multiprocessors, capability: 90 of sm_90)"""
        return self._emulated_limits or _limits_of(device.index or 0)

    def attention_forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, None]:
        q = call.q
        out = empty_output(q, call.v.shape[3])
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        parts, floats = self.module.attention_forward_plan(call, out, lse)
        workspace = lse.new_empty(floats) if floats else None
        self.module.attention_forward(call, out, lse, parts, workspace)
        return out, lse, None

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
        empty = 0 in (*call.q.shape, *call.k.shape)
        new = torch.zeros_like if empty else torch.empty_like
        dq, dk, dv = (
            new(tensor) if need else None
            for tensor, need in zip((call.q, call.k, call.v), needs, strict=False)
        )
        dbias = None
        if bias is not None and needs[3]:
            dbias = (lse.new_zeros if empty else lse.new_empty)(bias_gradient_shape(bias))
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        if dlse is not None:
            dlse = dlse.to(lse.dtype).contiguous()
        workspace = lse.new_empty((4, *lse.shape))
        outputs = (delta, dq, dk, dv, dbias)
        self.module.attention_backward(call, (out, lse), dout, dlse, outputs, workspace)
        dsinks = None
        if sinks is not None and needs[4]:
            dsinks = sink_gradient(sinks, lse, lse_low, delta, dlse)
        if bias is not None and dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dq, dk, dv, dbias, dsinks

    def sums_workspace(
        self, call: LayerNormCall, rstd: Tensor, grads: tuple[Tensor | None, ...]
    ) -> tuple[Any, ...]:
        rows = 0
        if grads[2] is not None or grads[3] is not None:
            # Two blocks of four rows each for a multiprocessor.
            rows = max(4, min(rstd.numel(), 8 * self._limits(rstd.device)[1]))
        return (rstd.new_empty((rows, 2, call.width)),)


# ------------------------------------------------------------------------------------- the details


def _size_reasons(request: Request) -> list[str]:
    """What no grid holds: a block takes a tile of queries or keys, or for dbias one of both."""
    batch, heads, q_len, _ = request.shapes[0]
    longest = max(q_len, request.shapes[1][2])
    if longest > MAX_LENGTH:
        return [f"serves up to {MAX_LENGTH} queries and keys (got {longest})"]
    tiles = (longest + SMALLEST_TILE - 1) // SMALLEST_TILE
    of_bias = request.needs_backward and "bias" in request.flags
    blocks = batch * heads * tiles * (tiles if of_bias else 1)
    if blocks > MAX_BLOCKS:
        return [f"needs {blocks} tiles (a launch has up to {MAX_BLOCKS})"]
    return []


def _no_device() -> str:
    """Why no kernel can run here; empty when they can."""
    if torch.version.hip or not torch.cuda.is_available():
        return "needs an NVIDIA GPU (torch sees none)"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"needs compute capability 8.0 or newer (got {capability[0]}.{capability[1]})"
    return ""


@functools.cache
def _limits_of(index: int) -> tuple[int, int, int]:
    module, reason = load_extension()
    assert module is not None, reason
    shared_bytes, multiprocessors, capability = module.limits(index)
    return shared_bytes, multiprocessors, capability


# Constants to torch.compile, which could not trace them.
_no_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
_limits_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
