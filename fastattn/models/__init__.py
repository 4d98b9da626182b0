"""The reference Transformer. Not imported by `import fastattn`."""

from fastattn.models.bert import (
    MaskedLanguageModel,
    PretrainingLogits,
    SequenceClassifier,
    mean_pool,
)
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
    "MaskedLanguageModel",
    "PretrainingLogits",
    "SequenceClassifier",
    "TransformerConfig",
    "cross_entropy",
    "mean_pool",
]
