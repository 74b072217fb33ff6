"""Philox4x32-10 and Box–Muller in NumPy, written for the tests alone, and Philox backwards.

The inverse finds counters whose words are the ones wanted, so that the places where a kernel could go wrong (a uniform
next to 0 or 1, an angle next to a quadrant's end) are reached through the public function instead of by luck.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def _round_keys(seed: int) -> list[tuple[int, int]]:
    k0, k1 = seed % 2**32, seed >> 32
    return [((k0 + i * W0) % 2**32, (k1 + i * W1) % 2**32) for i in range(10)]


def philox(seed: int, counters: np.ndarray) -> np.ndarray:
    """uint64 (…, 4) words of uint64 (…, 4) counters, all below 2^32."""
    c0, c1, c2, c3 = np.moveaxis(counters.astype(np.uint64), -1, 0)
    for k0, k1 in _round_keys(seed):
        p0, p1 = c0 * np.uint64(M0), c2 * np.uint64(M1)
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ np.uint64(k0), p1 & LOW, (p0 >> SHIFT) ^ c3 ^ np.uint64(k1), p0 & LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def philox_inverse(seed: int, words: np.ndarray) -> np.ndarray:
    """The counters whose words these are: an odd multiplier has an inverse modulo 2^32."""
    d0, d1, d2, d3 = np.moveaxis(words.astype(np.uint64), -1, 0)
    inverse0, inverse1 = np.uint64(pow(M0, -1, 2**32)), np.uint64(pow(M1, -1, 2**32))
    for k0, k1 in reversed(_round_keys(seed)):
        c0, c2 = (d3 * inverse0) & LOW, (d1 * inverse1) & LOW
        p0, p1 = c0 * np.uint64(M0), c2 * np.uint64(M1)
        d0, d1, d2, d3 = c0, d0 ^ (p1 >> SHIFT) ^ np.uint64(k0), c2, d2 ^ (p0 >> SHIFT) ^ np.uint64(k1)
    return np.stack([d0, d1, d2, d3], axis=-1)


def expected_words(shape: tuple[int, ...], seed: int, draw: int, samples: list[int], stream: int) -> np.ndarray:
    """What philox_uint32 must return, for explicit sample indices."""
    size = int(np.prod(shape[1:]))
    blocks = -(-size // 4)
    counters = np.zeros((shape[0], blocks, 4), dtype=np.uint64)
    counters[..., 0] = np.arange(blocks)
    counters[..., 1] = draw % 2**32
    counters[..., 2] = np.array([s % 2**32 for s in samples], dtype=np.uint64).reshape(-1, 1)
    counters[..., 3] = np.array([((s >> 32) * 2**16 + stream) % 2**32 for s in samples], dtype=np.uint64).reshape(-1, 1)
    return philox(seed, counters).reshape(shape[0], 4 * blocks)[:, :size].reshape(shape).astype(np.int64)


def exact_normals(words: np.ndarray) -> np.ndarray:
    """float64 normals (flat) of words (…, even), right to a few float64 ulp everywhere."""
    g = words.reshape(-1, 2).astype(np.int64)
    below, above = (g[:, 0] + 0.5) * 2.0**-32, (2.0**32 - g[:, 0] - 0.5) * 2.0**-32
    radius = np.sqrt(-2 * np.where(below > 0.5, np.log1p(-above), np.log(below)))
    quadrant, rest = np.divmod((g[:, 1] + 2**29) % 2**32, 2**30)
    angle = (rest - 2**29 + 0.5) * (2 * np.pi * 2.0**-32)
    c, s = np.cos(angle), np.sin(angle)
    cosine, sine = np.choose(quadrant, [c, -s, -c, s]), np.choose(quadrant, [s, c, -s, -c])
    return np.stack([radius * cosine, radius * sine], axis=-1).reshape(-1)


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|actual − exact| in units of the last place of a float32 at the exact value."""
    return np.abs(actual.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


class Address(NamedTuple):
    """The arguments under which two words come out: element 4·block of the one sample `sample`."""

    seed: int
    draw: int
    sample: int
    stream: int
    block: int


def address_of(g0: int, g1: int, *, seed: int = 1, max_block: int = 4096) -> Address:
    """A counter with words (g0, g1, anything, anything) whose block is small enough to be computed in a test."""
    rng = np.random.default_rng([g0, g1])
    while True:
        words = np.empty((2**19, 4), dtype=np.uint64)
        words[:, 0], words[:, 1] = g0, g1
        words[:, 2:] = rng.integers(0, 2**32, (2**19, 2), dtype=np.uint64)
        counters = philox_inverse(seed, words)
        found = counters[counters[:, 0] < max_block]
        if len(found):
            block, draw, low, high = (int(c) for c in found[0])
            return Address(seed, draw, (high >> 16 << 32) + low, high % 2**16, block)
