"""Fused attention, layer norm and softmax for PyTorch, each with a backward and several backends."""

from .dispatch import backends
from .ops.attention import attention, explain, scaled_dot_product_attention
from .ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .ops.softmax import log_softmax, softmax

__version__ = "0.1.0"

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backends",
    "explain",
    "layer_norm",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]
