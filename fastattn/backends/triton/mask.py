"""Which keys a query sees: the twin of ``Mask`` in fastattn/spec.py, same functions, same names.

A mask is (left, right, shift): query i sees key j when ``i + shift - left <= j <= i + shift +
right``. Here a side without a limit is None, so that what it costs is decided at compile time.
Half-open intervals throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Mask(NamedTuple):
    left: Any  # None: no limit
    right: Any
    shift: Any

    @classmethod
    def of(cls, left: int, right: int, shift: int, q_len: int, k_len: int) -> Mask:
        """From the numbers of a call, without the limits that lie beyond every query's keys."""
        if q_len - 1 + shift <= left:  # reaches before key 0, also from the last query
            left = -1
        if shift + right >= k_len - 1 and right >= 0:  # the last key, also from the first query
            right = -1
        return cls(None if left < 0 else left, None if right < 0 else right, shift)


@triton.jit
def keys_of(i, k_len, mask):
    """The keys that query i sees out of k_len."""
    begin = 0 * i
    end = 0 * i + k_len
    if mask.left is not None:
        begin = i + mask.shift - mask.left
        begin = tl.minimum(tl.maximum(begin, 0), k_len)
    if mask.right is not None:
        end = i + mask.shift + mask.right + 1
        end = tl.maximum(tl.minimum(end, k_len), begin)
    return begin, end


@triton.jit
def any_keys(i_begin, i_end, k_len, mask):
    """Keys that at least one query of the tile [i_begin, i_end) sees."""
    begin, _ = keys_of(i_begin, k_len, mask)
    _, end = keys_of(i_end - 1, k_len, mask)
    return begin, tl.maximum(begin, end)


@triton.jit
def all_keys(i_begin, i_end, k_len, mask):
    """Keys that every query of the tile [i_begin, i_end) sees."""
    begin, _ = keys_of(i_end - 1, k_len, mask)
    _, end = keys_of(i_begin, k_len, mask)
    return begin, tl.maximum(begin, end)


@triton.jit
def any_queries(j_begin, j_end, q_len, mask):
    """Queries that see at least one key of [j_begin, j_end): the rule read the other way."""
    begin = 0 * j_begin
    end = 0 * j_begin + q_len
    if mask.right is not None:
        begin = j_begin - mask.shift - mask.right
        begin = tl.minimum(tl.maximum(begin, 0), q_len)
    if mask.left is not None:
        end = j_end - mask.shift + mask.left
        end = tl.maximum(tl.minimum(end, q_len), begin)
    return begin, end


@triton.jit
def all_queries(j_begin, j_end, q_len, mask):
    """Queries that see every key of [j_begin, j_end)."""
    begin = 0 * j_begin
    end = 0 * j_begin + q_len
    if mask.right is not None:
        begin = j_end - 1 - mask.shift - mask.right
        begin = tl.minimum(tl.maximum(begin, 0), q_len)
    if mask.left is not None:
        end = j_begin + 1 - mask.shift + mask.left
        end = tl.maximum(tl.minimum(end, q_len), begin)
    return begin, end


@triton.jit
def visible(i, j, k_len, mask):
    """Which of the queries i see which of the keys j; both broadcast."""
    sees = j < k_len
    if mask.left is not None:
        sees = sees & (j - i >= mask.shift - mask.left)
    if mask.right is not None:
        sees = sees & (j - i <= mask.shift + mask.right)
    return sees
