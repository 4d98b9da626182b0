"""Small models of torch.nn's modules, as people write them, for the tests of what patches models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """As timm and torchvision write it."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), k, v, dropout_p=0.0)
        return self.proj(out.transpose(1, 2).flatten(2))


def helper(x):
    return torch.nn.functional.softmax(x, -1)


class ByHelpers(nn.Module):
    """Its softmax is two calls away."""

    def forward(self, x):
        return self.weigh(x)

    def weigh(self, x):
        return x * helper(x)


class Norm2d(nn.LayerNorm):
    """torchvision's ConvNeXt has this."""

    def forward(self, x):
        x = F.layer_norm(
            x.transpose(1, -1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.transpose(1, -1)


class Inherits(nn.LayerNorm):
    pass


class OwnAttention(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), Attention(), Inherits(16)
        self.mlp, self.helpers = nn.Linear(16, 16), ByHelpers()
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return self.softmax(self.helpers(x + self.mlp(self.norm2(x))))


def vision():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def translation():
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True)


MODELS = {
    "vision": (vision, (2, 7, 16)),
    "encoder": (lambda: translation().encoder, (2, 7, 16)),
    "norm2d": (lambda: nn.Sequential(Norm2d(16)), (2, 16, 5, 16)),
}
models = pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)


def classes(model):
    return [type(module) for module in model.modules()]
