"""The CUDA backend: C++ kernels for NVIDIA GPUs from sm_80 on.

There where nvcc was at install (``fastattn._cuda``). The tests hand it a module that runs the same
kernels in an emulator, on tensors in the CPU's memory.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import AttentionCall, Backend, LayerNormCall, Needs, SoftmaxCall, empty_output
from .rows import columns_of, rows_of

if TYPE_CHECKING:
    from ..dispatch import Request

ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *ATTENTION_DTYPES)
OLDEST = (8, 0)
MAX_HEAD_DIM = 256


def load_extension() -> tuple[ModuleType | None, str]:
    """(module, why there is none)"""
    try:
        module = importlib.import_module("fastattn._cuda")
        module.use_exchange(Tensor.__dlpack_c_exchange_api__)
        return module, ""
    except ModuleNotFoundError:
        pass
    except (AttributeError, ImportError):
        return None, f"torch {torch.__version__} does not offer DLPack's exchange API 1"
    try:
        reason = str(importlib.import_module("fastattn._build_info").CUDA_REASON)
    except (ModuleNotFoundError, AttributeError):
        reason = ""
    return None, f"not built: {reason or 'run pip install . where there is nvcc'}"


class CudaBackend(Backend):
    name = "cuda"

    def __init__(self, module: ModuleType | None = None) -> None:
        self._unavailable: str | None = None
        self.emulated = module is not None
        if module is None:
            module, reason = load_extension()
            self._unavailable = reason or None  # the device is looked for when somebody asks
        else:
            module.use_exchange(Tensor.__dlpack_c_exchange_api__)
            self._unavailable = ""
        self._module = module
        self._emulated_limits = module.limits(0) if module and self.emulated else ()
        # What a block of attention needs, read now: reasons() may run under torch.compile.
        self._head_dims = [
            (n, module.attention_shared_bytes(n) if module else 1)
            for n in range(32, MAX_HEAD_DIM + 1, 32)
        ]

    @property
    def module(self) -> ModuleType:
        assert self._module is not None
        return self._module

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
        elif request.dtype not in DTYPES:
            reasons.append(f"serves float32, bfloat16 and float16 (got {request.dtype})")
        return reasons

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
        have, _ = self._limits(request.device)
        if needed <= have:
            return []
        return [
            f"head dim {head_dim} needs {needed} bytes of shared memory a block (here are {have})"
        ]

    def _limits(self, device: torch.device) -> tuple[int, int]:
        """(shared memory that a block may have, multiprocessors)"""
        return self._emulated_limits or _limits_of(device.index or 0)

    # ------------------------------------------------------------------------------- attention

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
            shape = [
                size if step else 1 for size, step in zip(bias.shape, bias.stride(), strict=True)
            ]
            dbias = (lse.new_zeros if empty else lse.new_empty)(shape)
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        if dlse is not None:
            dlse = dlse.to(lse.dtype).contiguous()
        workspace = lse.new_empty((4, *lse.shape))
        outputs = (delta, dq, dk, dv, dbias)
        self.module.attention_backward(call, (out, lse), dout, dlse, outputs, workspace)
        dsinks = None
        if sinks is not None and needs[4]:
            # The sink's probability is exp(sink - lse); its value is zero, so its dp is too.
            # One number gathers from every row: in float64.
            share = torch.exp(sinks.double()[:, None] - lse.double())
            share = share.masked_fill(lse == -math.inf, 0.0)
            dlogit = share * (delta if dlse is None else delta - dlse)
            dsinks = -dlogit.sum((0, 2)).to(sinks.dtype)
        if bias is not None and dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dq, dk, dv, dbias, dsinks

    # ------------------------------------------------------------------------------ layer norm

    def layer_norm_forward(
        self, call: LayerNormCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        call = _with_contiguous_weights(call)
        x, residual, width = call.x, call.residual, call.width
        rows = x.numel() // width if width else 0
        y = _empty(x)
        new_residual = None if residual is None else _empty(x)
        mean = rstd = None
        if call.for_backward:
            rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
            mean = None if call.rms else torch.empty_like(rstd)
        outputs = y, new_residual, mean, rstd
        if rows:
            self.module.layer_norm_forward(call, rows_of(width, x, residual), outputs)
        return outputs

    def layer_norm_backward(
        self,
        call: LayerNormCall,
        source: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        dy: Tensor,
        dnew_residual: Tensor | None,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        call = _with_contiguous_weights(call)
        like = (source, None if call.residual is None else source, call.weight, call.bias)
        grads = tuple(
            _empty(x) if need and x is not None else None
            for x, need in zip(like, needs, strict=True)
        )
        rows = rstd.numel()
        if not rows:
            for dx in grads:
                if dx is not None:
                    dx.zero_()
            return grads
        partial_rows = 0
        if grads[2] is not None or grads[3] is not None:
            # Two blocks of four rows each for a multiprocessor.
            partial_rows = max(4, min(rows, 8 * self._limits(source.device)[1]))
        partials = rstd.new_empty((partial_rows, 2, call.width))
        walk = rows_of(call.width, source, dy, dnew_residual)
        self.module.layer_norm_backward(call, walk, mean, rstd, grads, partials)
        return grads

    # --------------------------------------------------------------------------------- softmax

    def softmax_forward(self, call: SoftmaxCall) -> Tensor:
        x = call.x
        y = torch.empty(x.shape, dtype=call.dtype, device=x.device)
        if x.numel():
            self.module.softmax_forward(call, columns_of(call.dim, (x,), call.mask), y)
        return y

    def softmax_backward(
        self, y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
    ) -> Tensor:
        dx = torch.empty(y.shape, dtype=x_dtype, device=y.device)
        if y.numel():
            self.module.softmax_backward(columns_of(dim, (y, dy)), scale, log, dx)
        return dx


# ------------------------------------------------------------------------------------- the details


def _no_device() -> str:
    """Why no kernel can run here; empty when they can."""
    if torch.version.hip or not torch.cuda.is_available():
        return "needs an NVIDIA GPU (torch sees none)"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"needs compute capability 8.0 or newer (got {capability[0]}.{capability[1]})"
    return ""


@functools.cache
def _limits_of(index: int) -> tuple[int, int]:
    module, reason = load_extension()
    assert module is not None, reason
    shared_bytes, multiprocessors = module.limits(index)
    return shared_bytes, multiprocessors


# Constants to torch.compile, which could not trace them.
_no_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
_limits_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _with_contiguous_weights(call: LayerNormCall) -> LayerNormCall:
    weight, bias = call.weight, call.bias
    if weight is not None and not weight.is_contiguous():
        call = call._replace(weight=weight.contiguous())
    if bias is not None and not bias.is_contiguous():
        call = call._replace(bias=bias.contiguous())
    return call
