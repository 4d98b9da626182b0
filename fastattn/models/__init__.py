"""The reference Transformer. Not imported by `import fastattn`."""

from fastattn.models.generation import Decoding
from fastattn.models.transformer import (
    Decoder,
    Encoder,
    EncoderDecoder,
    LanguageModel,
    TransformerConfig,
    cross_entropy,
)

__all__ = [
    "Decoder",
    "Decoding",
    "Encoder",
    "EncoderDecoder",
    "LanguageModel",
    "TransformerConfig",
    "cross_entropy",
]
