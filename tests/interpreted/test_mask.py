"""The twin of spec.Mask in Triton: every function, on every small shape. ``mask.h`` is held to the
same by ``test_one_truth.py``, through the kernels."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from fastattn.backends.triton import mask as twin
from fastattn.spec import Mask

N = 16  # tiles [begin, end) of up to N queries or keys
LIMITS = (-1, 0, 1, 3, 20)
SHIFTS = (-17, -4, -1, 0, 2, 6)


@triton.jit
def intervals_kernel(out_ptr, length, mask, FUNCTION: tl.constexpr, N: tl.constexpr):
    first = tl.arange(0, N)[:, None] + tl.zeros((N, N), tl.int32)
    last = tl.arange(0, N)[None, :] + tl.zeros((N, N), tl.int32)
    if FUNCTION == "keys_of":
        begin, end = twin.keys_of(first, length, mask)
    elif FUNCTION == "any_keys":
        begin, end = twin.any_keys(first, last + 1, length, mask)
    elif FUNCTION == "all_keys":
        begin, end = twin.all_keys(first, last + 1, length, mask)
    elif FUNCTION == "any_queries":
        begin, end = twin.any_queries(first, last + 1, length, mask)
    else:
        begin, end = twin.all_queries(first, last + 1, length, mask)
    at = first * N + last
    tl.store(out_ptr + at, begin)
    tl.store(out_ptr + N * N + at, end)


@triton.jit
def visible_kernel(out_ptr, k_len, mask, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(out_ptr + i * N + j, twin.visible(i, j, k_len, mask).to(tl.int32))


def in_triton(mask):
    left, right = (None if limit < 0 else limit for limit in mask[:2])
    return twin.Mask(left, right, mask.shift)


def all_queries(mask, j_begin, j_end, q_len):
    """Of the definition: the queries that see every key of a tile."""
    seen = [i for i in range(q_len) if all(sees(mask, i, j) for j in range(j_begin, j_end))]
    return (seen[0], seen[-1] + 1) if seen else (0, 0)


def sees(mask, i, j):
    begin, end = mask.keys_of(i, 10**6)
    return begin <= j < end


@pytest.mark.parametrize("length", [1, 4, 7, 13])
@pytest.mark.parametrize(
    "function", ["keys_of", "any_keys", "all_keys", "any_queries", "all_queries"]
)
def test_every_interval(function, length):
    out = torch.empty(2, N, N, dtype=torch.int32)
    for mask in itertools.starmap(Mask, itertools.product(LIMITS, LIMITS, SHIFTS)):
        intervals_kernel[(1,)](out, length, in_triton(mask), function, N)
        for a in range(N):
            for b in range(a, N):
                if function == "keys_of":
                    expected = mask.keys_of(a, length)
                elif function == "all_queries":
                    expected = all_queries(mask, a, b + 1, length)
                else:
                    expected = getattr(mask, function)(a, b + 1, length)
                got = tuple(out[:, a, b].tolist())
                empty = expected[0] >= expected[1]
                same = got == expected or (empty and got[0] >= got[1])
                assert same, (mask, a, b, got, expected)


@pytest.mark.parametrize("k_len", [1, 7, 16])
def test_every_pair(k_len):
    out = torch.zeros(N, N, dtype=torch.int32)  # the interpreter stores a bool as one byte
    for mask in itertools.starmap(Mask, itertools.product(LIMITS, LIMITS, SHIFTS)):
        visible_kernel[(1,)](out, k_len, in_triton(mask), N)
        expected = torch.zeros(N, N, dtype=torch.bool)
        expected[:, :k_len] = mask.dense_mask(N, k_len)
        assert torch.equal(out.bool(), expected), mask
