"""The mask arithmetic and what AttentionSpec makes of the arguments."""

import itertools
import math
import sys

import pytest
import torch

from fastattn.spec import AttentionSpec, Mask

LIMITS = (-1, 0, 1, 3)
LENGTHS = (1, 2, 5)
MASKS = [
    (Mask(left, right, shift), q_len, k_len)
    for left, right, shift, q_len, k_len in itertools.product(
        LIMITS, LIMITS, (-4, -1, 0, 2, 6), LENGTHS, (0, 1, 4, 6)
    )
]


def sees(mask: Mask, i: int, j: int) -> bool:
    """The definition, word for word."""
    at = i + mask.shift
    after = mask.left < 0 or at - mask.left <= j
    return after and (mask.right < 0 or j <= at + mask.right)


def test_dense_mask_is_the_definition():
    for mask, q_len, k_len in MASKS:
        expected = [[sees(mask, i, j) for j in range(k_len)] for i in range(q_len)]
        assert mask.dense_mask(q_len, k_len).tolist() == expected, mask


def test_key_ranges_of_tiles():
    for mask, q_len, k_len in MASKS:
        seen = [{j for j in range(k_len) if sees(mask, i, j)} for i in range(q_len)]
        for i in range(q_len):
            assert set(range(*mask.keys_of(i, k_len))) == seen[i]
        for begin, end in itertools.combinations(range(q_len + 1), 2):
            tile = seen[begin:end]
            any_begin, any_end = mask.any_keys(begin, end, k_len)
            assert 0 <= any_begin <= any_end <= k_len
            assert set().union(*tile) <= set(range(any_begin, any_end))
            assert set(range(*mask.all_keys(begin, end, k_len))) == set.intersection(*tile)


def test_query_ranges_read_the_rule_the_other_way():
    for mask, q_len, k_len in MASKS:
        for begin, end in itertools.combinations(range(k_len + 1), 2):
            queries = {i for i in range(q_len) if any(sees(mask, i, j) for j in range(begin, end))}
            assert queries <= set(range(*mask.any_queries(begin, end, q_len)))


def spec(q_len: int = 4, k_len: int = 7, **keywords) -> AttentionSpec:
    q, k = torch.zeros(1, 2, q_len, 16), torch.zeros(1, 2, k_len, 16)
    return AttentionSpec.of(q, k, k, **keywords)


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, Mask(-1, -1, 3)),
        ({"causal": True}, Mask(-1, 0, 3)),
        ({"causal": "bottom_right"}, Mask(-1, 0, 3)),
        ({"causal": "top_left"}, Mask(-1, 0, 0)),
        ({"window": (2, None)}, Mask(2, -1, 3)),
        ({"window": [-1, 5]}, Mask(-1, 5, 3)),
        ({"window": (sys.maxsize, 10**30)}, Mask(-1, -1, 3)),
        ({"causal": True, "window": (2, 5)}, Mask(2, 0, 3)),
        ({"causal": "top_left", "window": (2, None)}, Mask(2, 0, 0)),
    ],
)
def test_mask_of_the_arguments(keywords, expected):
    assert spec(**keywords).mask == expected


def test_scalars_of_the_arguments():
    assert spec().scale == 1 / math.sqrt(16)
    assert spec(scale=0).scale == 0.0
    assert spec(scale=-2).scale == -2.0
    assert spec().softcap == spec(softcap=0).softcap == 0.0
    assert spec(softcap=30).softcap == 30.0
    assert spec(dropout_p=1).dropout_p == 1.0
