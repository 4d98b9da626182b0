"""Attention of fastattn.nn beside torch.nn's over calls drawn at random, odd ones among them."""

import random
import warnings

import pytest
import torch
from torch import nn

from fastattn import nn as ours

WIDTH = 8


def drawn(seed):
    """(torch's module, ours of the same weights, inputs, keywords); the call may be wrong."""
    pick = random.Random(seed).choice
    torch.manual_seed(seed)
    heads, kdim, vdim = pick((1, 2, 4)), pick((None, 8, 6)), pick((None, 8, 10))
    options = {name: pick((True, False)) for name in ("bias", "batch_first")}
    options |= {name: pick((False, False, True)) for name in ("add_bias_kv", "add_zero_attn")}
    modules = [
        library.MultiheadAttention(WIDTH, heads, kdim=kdim, vdim=vdim, **options)
        for library in (nn, ours)
    ]
    for p in modules[0].parameters():
        nn.init.normal_(p, std=0.4)
    modules[1].load_state_dict(modules[0].state_dict())

    batch, length, keys = pick((0, 1, 2, 2)), pick((1, 3, 4)), pick((0, 1, 3, 5))
    batched = pick((True, True, False))
    shapes = [(length, WIDTH), (keys, kdim or WIDTH), (keys, vdim or WIDTH)]
    inputs = [torch.randn(batch, *shape) if batched else torch.randn(shape) for shape in shapes]
    if batched and not options["batch_first"]:
        inputs = [x.transpose(0, 1) for x in inputs]

    def mask(*shapes):
        kind, seen = pick((torch.bool, torch.bool, torch.float32, torch.int32)), pick(shapes)
        hidden = torch.rand(seen) < 0.3
        if kind is torch.float32:
            return torch.zeros(seen).masked_fill(hidden, pick((-1.0, -torch.inf)))
        return hidden.to(kind)

    padded = (batch, keys) if batched else (keys,)
    rows = (batch * heads if batched else heads, length, keys)
    keywords = {name: pick((True, False)) for name in ("need_weights", "average_attn_weights")}
    if pick((True, False)):
        keywords["key_padding_mask"] = mask(padded, padded, padded, (*padded[:-1], keys + 1))
    if pick((True, False)):
        keywords["attn_mask"] = mask(rows[1:], rows[1:], rows, rows, (length, 1), (keys,))
        keywords["is_causal"] = pick((True, False, False, False))
    return modules, inputs, keywords


@pytest.mark.parametrize("seed", range(4))
def test_calls_at_random(seed):
    """The same values, or errors; torch stumbles over some calls without elements."""
    values = errors = 0
    for draw in range(60 * seed, 60 * (seed + 1)):
        (theirs, mine), inputs, keywords = drawn(draw)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of masks of two dtypes
            try:
                expected = theirs(*inputs, **keywords)
            except Exception as error:
                errors += 1
                if "reshape tensor of 0 elements" not in str(error):
                    with pytest.raises(type(error)):
                        mine(*inputs, **keywords)
                continue
            values += 1
            got = mine(*inputs, **keywords)
        message = f"draw {draw}: {keywords}"
        torch.testing.assert_close(
            got, expected, atol=1e-4, rtol=1e-4, equal_nan=True, msg=lambda m, s=message: f"{s} {m}"
        )
    assert values > 15 and errors > 15


@pytest.mark.parametrize("stack", ["TransformerEncoder", "TransformerDecoder"])
def test_a_stack_refuses_a_mask_of_integers(stack):
    layer = getattr(ours, f"{stack}Layer")(WIDTH, 2, 16, batch_first=True)
    inputs = [torch.randn(2, 4, WIDTH)] * (1 if stack == "TransformerEncoder" else 2)
    with pytest.raises(AssertionError, match="only bool and floating types"):
        getattr(ours, stack)(layer, 2)(*inputs, torch.ones(4, 4, dtype=torch.int32))
