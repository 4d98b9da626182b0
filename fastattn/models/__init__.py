"""The reference Transformer. Not imported by `import fastattn`."""

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
    "Encoder",
    "EncoderDecoder",
    "LanguageModel",
    "TransformerConfig",
    "cross_entropy",
]
