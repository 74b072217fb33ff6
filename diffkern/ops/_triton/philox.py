"""Philox4x32-10 (Salmon et al. 2011) and the library's counter layout, version 1 (docs/noise.md)."""

from __future__ import annotations

import triton
import triton.language as tl

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(10)


@triton.jit
def words(c0, c1, c2, c3, k0, k1):
    """The four words of each counter, all uint32. Scalars among the arguments cost one instruction a program."""
    for _ in tl.static_range(ROUNDS):
        # Written in 64 bits: one wide multiplication gives both halves, where umulhi and * would be two.
        p0 = c0.to(tl.uint64) * tl.full((), M0, tl.uint64)
        p1 = c2.to(tl.uint64) * tl.full((), M1, tl.uint64)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += tl.full((), W0, tl.uint32)
        k1 += tl.full((), W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def key(seed):
    """(k0, k1) of the 64 bits of an int64."""
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def tail(draw, sample, stream):
    """Words 1 to 3 of the counter: draw mod 2³², sample mod 2³², (sample div 2³²)·2¹⁶ + stream mod 2³²."""
    return draw.to(tl.uint32), sample.to(tl.uint32), (((sample >> 32) << 16) + stream).to(tl.uint32)
