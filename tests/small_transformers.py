"""The reference Transformers that the tests build, and what they feed them."""

import torch

from fastattn.models import TransformerConfig

VOCAB = 53
NORMS = ("pre", "post")
KINDS = ("fused", "naive", "torch")
# The error of a whole model: a few hundred roundings, and gradients of order 0.1 and below.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def config(**fields):
    small = {
        "vocab_size": VOCAB,
        "max_len": 48,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "d_ff": 48,
    }
    return TransformerConfig(**{**small, **fields})


def build(model, seed=0, dtype=torch.float32, **fields):
    torch.manual_seed(seed)
    model = model(config(**fields)).to(dtype)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the trivial start: unit weights, zero biases, tiny logits
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=noise))
    return model


def each_kind(model, dtype=torch.float32, **fields):
    return [build(model, dtype=dtype, attention=kind, **fields) for kind in KINDS]


def tokens(*shape, seed=2):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def right_padding(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def left_padding(lengths, width):
    return right_padding(lengths, width).flip(1)
