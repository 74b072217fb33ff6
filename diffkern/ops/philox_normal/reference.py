"""The noise as formulas: Philox on int64 tensors, Box–Muller in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Which element, draw, sample and stream a counter stands for, and what its words become: docs/noise.md. A change of
# either is another version, and another major version of the library.
NOISE_LAYOUT_VERSION = 1

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF


def philox_words(num_samples: int, size: int, seed: Tensor, draw: Tensor, samples: Tensor, stream: int) -> Tensor:
    """The words of every element: int64 (N, size), each in [0, 2^32)."""
    device = seed.device
    blocks = torch.arange((size + 3) // 4, device=device)
    sample = (samples if samples.dim() else samples + torch.arange(num_samples, device=device)).reshape(-1, 1)
    draws = draw.reshape(-1, 1)
    shape = (num_samples, blocks.numel())
    c0 = (blocks & MASK).expand(shape)
    c1 = (draws & MASK).expand(shape)
    c2 = (sample & MASK).expand(shape)
    c3 = ((((sample >> 32) & MASK) << 16) + stream & MASK).expand(shape)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # A product of two 32-bit numbers wraps in int64 with all of its 64 bits intact.
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return torch.stack([c0, c1, c2, c3], dim=-1).reshape(num_samples, -1)[:, :size]


def box_muller(words: Tensor) -> Tensor:
    """float64 (N, 4·k) normals from int64 (N, 4·k) words: pairs (g0, g1) give √(−2 ln u1)·(cos, sin)(2π·u2).

    The quadrant is taken from the integer, because 2π·u2 rounded is wrong where its cosine or sine is all but zero.
    """
    g0, g1 = words.unflatten(-1, (-1, 2)).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log((g0.double() + 0.5) * 2.0**-32))
    shifted = g1 + 2**29
    quadrant = (shifted >> 30) & 3
    angle = ((shifted & (2**30 - 1)).double() - 2.0**29 + 0.5) * (2.0 * math.pi * 2.0**-32)
    cosine, sine = radius * torch.cos(angle), radius * torch.sin(angle)
    odd = quadrant & 1 == 1
    of_cos, of_sin = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    of_cos = torch.where((quadrant + 1) & 2 == 2, -of_cos, of_cos)
    of_sin = torch.where(quadrant & 2 == 2, -of_sin, of_sin)
    return torch.stack([of_cos, of_sin], dim=-1).flatten(-2)


def normals(shape: Sequence[int], seed: Tensor, draw: Tensor, samples: Tensor, stream: int) -> Tensor:
    """float64 normals of `shape`, contiguous."""
    size = math.prod(shape[1:])
    if shape[0] == 0 or size == 0:
        return torch.empty(shape, dtype=torch.float64, device=seed.device)
    words = philox_words(shape[0], (size + 3) // 4 * 4, seed, draw, samples, stream)
    return box_muller(words)[:, :size].contiguous().reshape(shape)


def philox_normal(
    shape: Sequence[int],
    seed: Tensor,
    draw: Tensor,
    samples: Tensor,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    z = normals(shape, seed, draw, samples, stream).to(dtype)
    return z.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else z


def philox_normal_unsupported(*args: object) -> None:
    return None
