"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the twin
of csrc/common/philox.h: every backend draws the same word for the same seed and coordinates."""

from __future__ import annotations

import triton
import triton.language as tl

_WORD = 2**32 - 1


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """The four random words (uint32) of each counter; seed is int64, counters broadcast."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c1 = c1.to(tl.uint32)
    c2 = c2.to(tl.uint32)
    c3 = c3.to(tl.uint32)
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        before0 = c0
        before2 = c2
        c0 = tl.umulhi(m1, before2) ^ c1 ^ k0
        c2 = tl.umulhi(m0, before0) ^ c3 ^ k1
        c1 = m1 * before2
        c3 = m0 * before0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """An element is kept when its word is at least this."""
    return min(int(p * 2**32), _WORD)
