"""The reference Transformer. Not imported by `import fastattn`."""

from fastattn.models.bert import (
    MaskedLanguageModel,
    PretrainingLogits,
    SequenceClassifier,
    mean_pool,
)
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
    "MaskedLanguageModel",
    "PretrainingLogits",
    "SequenceClassifier",
    "TransformerConfig",
    "cross_entropy",
    "mean_pool",
]
