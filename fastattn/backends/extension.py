"""What the backends in C++ and CUDA C++ share around their extension modules."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def show_tensors(module: ModuleType) -> str:
    """Lets an extension see torch's tensors (csrc/common/tensor.h); else why it cannot."""
    try:
        module.use_exchange(Tensor.__dlpack_c_exchange_api__)
    except (AttributeError, ImportError):
        return f"torch {torch.__version__} does not offer DLPack's exchange API 1"
    return ""
