"""The CUDA backend: C++ kernels for NVIDIA GPUs from sm_80 on.

There where nvcc was at install (``fastattn._cuda``). The tests hand it a module that runs the same
kernels in an emulator, on tensors in the CPU's memory.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .base import AttentionCall, Backend, LayerNormCall, Needs, SoftmaxCall, empty_output
from .rows import columns_of, rows_of

if TYPE_CHECKING:
    from ..dispatch import Request

# As in csrc/common/params.h.
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
}
OLDEST = (8, 0)


class Device(NamedTuple):
    """What the kernels want to know of a GPU."""

    multiprocessors: int
    shared_bytes: int  # that a block may have
    capability: tuple[int, int]

    @property
    def arch(self) -> int:
        """The capability as the kernels have it: 90 for (9, 0)."""
        return 10 * self.capability[0] + self.capability[1]


# The emulator's; few multiprocessors, so that the tests' small problems make blocks walk.
EMULATED = Device(3, 227 << 10, (8, 0))


def load_extension() -> tuple[ModuleType | None, str]:
    """(module, why there is none)"""
    try:
        return importlib.import_module("fastattn._cuda"), ""
    except ModuleNotFoundError:
        return None, "not built (no nvcc at install)"


class CudaBackend(Backend):
    name = "cuda"

    def __init__(self, module: ModuleType | None = None) -> None:
        self._module, self._unavailable = (module, "") if module else load_extension()
        self._checked = module is not None
        self._devices: dict[int | None, Device] = {}
        self.emulated = module is not None and module.EMULATED

    @property
    def device(self) -> str:
        return "cpu" if self.emulated else "cuda"

    def unavailable(self) -> str | None:
        if not self._checked:
            self._checked = True
            self._unavailable = self._unavailable or _no_device()
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
            reasons += self._attention_reasons(request)
        elif request.dtype not in DTYPES:
            reasons.append(f"serves float32, bfloat16 and float16 (got {request.dtype})")
        return reasons

    def _attention_reasons(self, request: Request) -> list[str]:
        reasons = []
        if request.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"serves attention in bfloat16 and float16 (got {request.dtype})")
        head_dim = max(shape[3] for shape in request.shapes)
        needed = self.module.attention_shared_bytes(head_dim) if self._module else 0
        if not needed:
            reasons.append(f"serves head dims up to 256 (got {head_dim})")
        elif request.device.type == self.device:
            have = self.limits(request.device).shared_bytes
            if needed > have:
                reasons.append(
                    f"head dim {head_dim} needs {needed} bytes of shared memory a block "
                    f"(this device has {have})"
                )
        return reasons

    @property
    def module(self) -> ModuleType:
        assert self._module is not None
        return self._module

    def limits(self, device: torch.device) -> Device:
        if self.emulated:
            return EMULATED
        found = self._devices.get(device.index)
        if found is None:
            properties = torch.cuda.get_device_properties(device)
            found = self._devices[device.index] = Device(
                properties.multi_processor_count,
                properties.shared_memory_per_block_optin,
                (properties.major, properties.minor),
            )
        return found

    def where(self, x: Tensor) -> tuple[int, int, int, int]:
        """The device and stream, as csrc/cuda/module.cpp takes them."""
        stream = 0 if self.emulated else torch.cuda.current_stream(x.device).cuda_stream
        limits = self.limits(x.device)
        return limits.shared_bytes, stream, limits.arch, limits.multiprocessors

    # ------------------------------------------------------------------------------- attention

    def attention_forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, None]:
        q = call.q
        out = empty_output(q, call.v.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        problem = attention_problem(call, out, lse)
        with _on_device_of(q):
            limits = self.limits(q.device)
            parts, floats = self.module.attention_forward_plan(
                problem, limits.multiprocessors, limits.arch
            )
            workspace = torch.empty(floats, dtype=torch.float32, device=q.device)
            self.module.attention_forward(problem, parts, workspace.data_ptr(), self.where(q))
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
        q, bias, sinks = call.q, call.bias, call.sinks
        # With no keys, or no queries, nothing is summed and nothing written.
        empty = 0 in (*q.shape, *call.k.shape)
        new = torch.zeros_like if empty else torch.empty_like
        dq, dk, dv = (
            new(tensor) if need else None
            for tensor, need in zip((q, call.k, call.v), needs, strict=False)
        )
        dbias = dbias_view = None
        if bias is not None and needs[3]:
            shape = [
                size if step else 1 for size, step in zip(bias.shape, bias.stride(), strict=True)
            ]
            dbias = (lse.new_zeros if empty else lse.new_empty)(shape)
            strides = (
                step if other else 0
                for step, other in zip(dbias.stride(), bias.stride(), strict=True)
            )
            dbias_view = (dbias.data_ptr(), *strides)
        delta = torch.empty_like(lse)
        lse = lse.contiguous()
        dlse = None if dlse is None else dlse.float().contiguous()
        problem = attention_problem(call, out, lse)
        with _on_device_of(q):
            floats = self.module.attention_backward_floats(problem)
            workspace = torch.empty(floats, dtype=torch.float32, device=q.device)
            grads = (
                _view(dout),
                _address(dlse),
                delta.data_ptr(),
                _view(dq),
                _view(dk),
                _view(dv),
                dbias_view,
            )
            self.module.attention_backward(problem, grads, workspace.data_ptr(), self.where(q))
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
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        x, residual, width = call.x, call.residual, call.width
        rows = x.numel() // width if width else 0
        y = _empty(x)
        new_residual = None if residual is None else _empty(x)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        mean = None if call.rms else torch.empty_like(rstd)
        if rows:
            shape, held, strides = rows_of(width, x, residual)
            views = map(_view, held, strides)
            kept, sizes, addresses = _weights(call, shape, mean, rstd)
            outputs = (_address(y), _address(new_residual))
            with _on_device_of(x):
                self.module.layer_norm_forward(
                    sizes, *views, addresses, call.eps, _dropout(call), outputs, self.where(x)
                )
            del kept
        return y, new_residual, mean, rstd

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
        rows, width = rstd.numel(), call.width
        like = (source, None if call.residual is None else source, call.weight, call.bias)
        grads = tuple(
            _empty(x) if need and x is not None else None
            for x, need in zip(like, needs, strict=True)
        )
        if not rows:
            for dx in grads:
                if dx is not None:
                    dx.zero_()
            return grads
        shape, held, strides = rows_of(width, source, dy, dnew_residual)
        source_view, dy_view, dnew_view = map(_view, held, strides)
        kept, sizes, addresses = _weights(call, shape, mean, rstd)
        partial_rows = 0
        if grads[2] is not None or grads[3] is not None:
            # Two blocks of four rows each for a multiprocessor.
            partial_rows = max(4, min(rows, 8 * self.limits(source.device).multiprocessors))
        partials = torch.empty(
            (partial_rows, 2, width), dtype=torch.float32, device=source.device
        )
        with _on_device_of(source):
            self.module.layer_norm_backward(
                sizes,
                source_view,
                addresses,
                call.eps,
                _dropout(call),
                dy_view,
                dnew_view,
                tuple(map(_address, grads)),
                (partials.data_ptr(), partial_rows),
                self.where(source),
            )
        del kept
        return grads

    # --------------------------------------------------------------------------------- softmax

    def softmax_forward(self, call: SoftmaxCall) -> Tensor:
        x = call.x
        y = torch.empty(x.shape, dtype=call.dtype, device=x.device)
        if not x.numel():
            return y
        shape, held, strides, mask_inner = columns_of(call.dim, (x,), call.mask)
        view, *mask_view = map(_view, held, strides)
        mask = (mask_view[0], DTYPES[held[1].dtype], mask_inner) if mask_view else None
        sizes = (*shape, DTYPES[x.dtype], DTYPES[call.dtype], call.log)
        with _on_device_of(x):
            self.module.softmax_forward(
                sizes, view, mask, call.scale, y.data_ptr(), self.where(x)
            )
        return y

    def softmax_backward(
        self, y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
    ) -> Tensor:
        dx = torch.empty(y.shape, dtype=x_dtype, device=y.device)
        if not y.numel():
            return dx
        shape, held, strides, _ = columns_of(dim, (y, dy))
        y_view, dy_view = map(_view, held, strides)
        sizes = (*shape, DTYPES[x_dtype], DTYPES[y.dtype], log)
        with _on_device_of(y):
            self.module.softmax_backward(
                sizes, y_view, dy_view, scale, dx.data_ptr(), self.where(y)
            )
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


_HERE = contextlib.nullcontext()


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device, which need not be x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _view(x: Tensor | None, strides: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    if x is None:
        return None
    return (x.data_ptr(), *(x.stride() if strides is None else strides))


def _dropout(call: LayerNormCall | AttentionCall) -> tuple[float, int] | None:
    """(p, address of the seed): the kernels read it when they run, the host never waits for it."""
    return None if call.seed is None else (call.dropout_p, call.seed.data_ptr())


def _weights(
    call: LayerNormCall, shape: tuple[int, int, int], mean: Tensor | None, rstd: Tensor
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], tuple[int, ...]]:
    """(what to keep alive until the launch, sizes, addresses)."""
    kept = tuple(None if x is None else x.contiguous() for x in (call.weight, call.bias))
    codes = (DTYPES[torch.float32 if x is None else x.dtype] for x in kept)
    sizes = (*shape, call.width, DTYPES[call.x.dtype], *codes, call.rms)
    return kept, sizes, tuple(map(_address, (*kept, mean, rstd)))


def attention_problem(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple:
    """The fields of AttentionParams (csrc/common/params.h), in the order of bind.h."""
    q, k, v, bias = call.q, call.k, call.v, call.bias
    batch, heads, q_len, head_dim = q.shape
    return (
        DTYPES[q.dtype],
        (batch, heads, k.shape[1], q_len, k.shape[2], head_dim, v.shape[3]),
        _view(q),
        _view(k),
        _view(v),
        _view(out),
        lse.data_ptr(),
        0,
        _view(bias),
        DTYPES[torch.bool] if bias is None else DTYPES[bias.dtype],
        _view(call.alibi_slopes),
        _address(call.sinks),
        (call.scale, call.softcap),
        (call.left, call.right, call.shift),
        _dropout(call),
        1,
    )
