"""The Triton backend: kernels for NVIDIA and AMD GPUs, and for the interpreter on a CPU.

Nothing here imports triton until a kernel is called: `import fastattn` stays fast, and works where
triton is not installed. Which kernels run, and how, is in the modules beside this one.
"""

from __future__ import annotations

import contextlib
import os
import re
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base import AttentionCall, Backend, LayerNormCall, Needs, SoftmaxCall

if TYPE_CHECKING:
    from ...dispatch import Request

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 512
OLDEST = (3, 6)  # the triton of torch 2.11
OLDEST_GPU = (8, 0)  # that multiplies bfloat16, and fetches while it computes

# Triton reads it when a kernel is decorated: it holds for the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _obstacle() -> str:
    """Why no kernel can run here; empty when they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (INTERPRETED or torch.cuda.is_available()):
        return "needs a CUDA or HIP device (torch sees none)"
    try:
        version = str(_triton().__version__)
    except Exception as error:  # a broken install, of whatever kind
        return f"triton cannot be imported ({type(error).__name__}: {error})".replace("\n", " ")
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        return f"needs triton {OLDEST[0]}.{OLDEST[1]} or newer (got {version})"
    return ""


_GPU_OBSTACLES: dict[torch.device, str] = {}


def _gpu_obstacle(device: torch.device) -> str:
    """Why no kernel can run on this GPU; empty when they can. AMD's have no numbers to compare."""
    found = _GPU_OBSTACLES.get(device)
    if found is None:
        gpu = torch.cuda.get_device_properties(device)
        old = not torch.version.hip and (gpu.major, gpu.minor) < OLDEST_GPU
        need = f"needs a GPU of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or newer"
        found = f"{need} (got {gpu.name}, {gpu.major}.{gpu.minor})" if old else ""
        _GPU_OBSTACLES[device] = found
    return found


# Constants to torch.compile, which could not trace the search for a package or a GPU.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gpu_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton() -> Any:
    return import_module("triton")


class TritonBackend(Backend):
    name = "triton"
    challenger = "cuda"

    def __init__(self) -> None:
        self._unavailable: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if INTERPRETED else "cuda"

    def unavailable(self) -> str | None:
        if self._unavailable is None:
            self._unavailable = _obstacle()
        return self._unavailable or None

    def detail(self) -> str:
        if self.unavailable():
            return ""
        where = "interpreter" if INTERPRETED else torch.cuda.get_device_name()
        return f"{_triton().__version__}, {where}"

    def reasons(self, request: Request) -> list[str]:
        reasons = []
        kind = request.device.type
        if INTERPRETED and kind != "cpu":
            reasons.append(f"its interpreter (TRITON_INTERPRET) needs a CPU tensor (got {kind})")
        if not INTERPRETED and kind != "cuda":  # so torch calls HIP's too
            reasons.append(f"needs a CUDA or HIP tensor (got {kind})")
        elif kind == "cuda" and (obstacle := _gpu_obstacle(request.device)):
            reasons.append(obstacle)
        if request.dtype not in DTYPES:
            reasons.append(f"serves float32, bfloat16 and float16 (got {request.dtype})")
        if request.op == "attention":
            reasons += self._head_dim_reasons(request)
        return reasons

    def _head_dim_reasons(self, request: Request) -> list[str]:
        """The least shared memory that a GPU has decides; the interpreter has any."""
        most = 256 if request.dtype is torch.float32 and not INTERPRETED else MAX_HEAD_DIM
        head_dim = max(shape[3] for shape in request.shapes)
        if head_dim <= most:
            return []
        return [f"serves head dims up to {most} in {request.dtype} (got {head_dim})"]

    def attention_forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, None]:
        with _on_device_of(call.q):
            return *_module("attention_forward").attention_forward(call), None

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
        with _on_device_of(call.q):
            module = _module("attention_backward")
            return module.attention_backward(call, dout, dlse, out, lse, needs)

    def layer_norm_forward(
        self, call: LayerNormCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        with _on_device_of(call.x):
            return _module("layer_norm").layer_norm_forward(call)

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
        with _on_device_of(source):
            module = _module("layer_norm")
            return module.layer_norm_backward(call, source, mean, rstd, dy, dnew_residual, needs)

    def softmax_forward(self, call: SoftmaxCall) -> Tensor:
        with _on_device_of(call.x):
            return _module("softmax").softmax_forward(call)

    def softmax_backward(
        self, y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
    ) -> Tensor:
        with _on_device_of(y):
            return _module("softmax").softmax_backward(y, dy, dim, scale, log, x_dtype)


_MODULES: dict[str, Any] = {}


def _module(name: str) -> Any:
    """The kernels of one family, imported at their first call."""
    module = _MODULES.get(name)
    if module is None:
        if INTERPRETED:
            import_module(f"{__name__}.interpreter").correct()
        module = _MODULES[name] = import_module(f"{__name__}.{name}")
    return module


_HERE = contextlib.nullcontext()


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream, which need not be x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)
