"""RMS norms as models write them out, recognised by what they compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import torch_calls

_EPS = ("variance_epsilon", "eps", "epsilon")


class Form(NamedTuple):
    """``x / rms(x) * (offset + weight)``, and what the module calls its eps."""

    eps: str
    offset: float  # 1: the weight is what is added to one (Gemma)


def recognise(module: nn.Module) -> Form | None:
    """The form of a module that is an RMS norm over the last dimension, or None.

    Its forward is tried on a few numbers of float32 beside each form, with a weight for the
    purpose: names promise little, and models differ in where the one is added. A module of other
    than one weight vector, or without memory (meta), is not recognised.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) != 1 or module._modules or module._buffers:
        return None
    names = [name for name in _EPS if isinstance(getattr(module, name, None), float)]
    if len(names) != 1 or weight.dim() != 1 or not torch_calls.served(weight) or weight.is_meta:
        return None
    width, device = weight.numel(), weight.device
    with torch.no_grad():
        waves = torch.arange(4 * width, device=device).view(4, -1).sin()
        # Rows with a mean, which is not to be subtracted, and rows as small as eps.
        x = (waves + 0.5) * torch.tensor([[1.0], [30.0], [1e-3], [1e-4]], device=device)
        probe = 0.3 + waves[0].abs()
        module._parameters["weight"] = nn.Parameter(probe, requires_grad=False)
        try:
            expected = type(module).forward(module, x)  # not its hooks
        except Exception:  # whatever it takes, it is not one tensor
            return None
        finally:
            module._parameters["weight"] = weight
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            return None
        for offset in (0.0, 1.0):
            got = _norm(x, probe, offset, getattr(module, names[0]))
            if torch.allclose(got, expected, atol=1e-5, rtol=1e-5):
                return Form(names[0], offset)
    return None


def forward(form: Form, kind: Any, self: Any, x: Tensor) -> Tensor:
    """The forward of a recognised module of class ``kind``."""
    if x.dtype is not self.weight.dtype:  # what comes of two dtypes is its own business
        return kind.forward(self, x)
    return _norm(x, self.weight, form.offset, getattr(self, form.eps))


def _norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    if offset:
        weight = offset + (weight if weight.dtype is torch.float64 else weight.float())
    return torch_calls.rms_norm(x, weight.shape, weight, eps)
