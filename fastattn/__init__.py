"""Fused attention, layer norm and softmax for PyTorch: forward, backward, several backends."""

from ._version import __version__
from .dispatch import backends
from .ops.attention import attention, explain, scaled_dot_product_attention
from .ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .ops.softmax import log_softmax, softmax
from .overriding import override, register
from .patching import patch, unpatch

register()  # in torch's registry, where whoever wants it activates it
del register

__all__ = [
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backends",
    "explain",
    "layer_norm",
    "log_softmax",
    "override",
    "patch",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "unpatch",
]
