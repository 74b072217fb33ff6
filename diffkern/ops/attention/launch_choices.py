"""How attention's kernels are launched: how many queries and keys a program takes, and with how many threads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffkern.ops._triton.launch import INTERPRETED, cdiv, multiprocessors, next_power_of_2

WHOLE_ROW = 256  # keys of which a row of scores is on chip at once
_MOST_CHANNELS = 128  # of a piece of a tile
MOST_POSITIONS = 256  # of a block


@dataclass(frozen=True)
class Blocks:
    """rows: queries, keys: keys of a block, powers of two from 16 on. stages: blocks that a loop has in flight."""

    rows: int
    keys: int
    num_warps: int
    stages: int


def pieces(head_channels: int) -> tuple[tuple[int, int], ...]:
    """(first channel, width): as many of 128 as fit, and the rest in one or two powers of two from 16 on."""
    found, first = [], 0
    while first < head_channels:
        left = head_channels - first
        width = max(min(next_power_of_2(left), _MOST_CHANNELS), 16)
        if width > 16 and left <= width // 2 + width // 4:
            width //= 2
        found.append((first, width))
        first += width
    return tuple(found)


def forward(pairs: int, queries: int, keys: int, head_channels: int, itemsize: int, device: torch.device) -> Blocks:
    of_keys = min(_block(keys), WHOLE_ROW) if keys <= WHOLE_ROW else 64
    rows = min(_block(queries), 64)
    return Blocks(_enough(rows, pairs, queries, device), of_keys, 4, 2)


def query_gradients(
    pairs: int, queries: int, keys: int, head_channels: int, itemsize: int, device: torch.device
) -> Blocks:
    return forward(pairs, queries, keys, head_channels, itemsize, device)


def key_gradients(
    pairs: int, queries: int, keys: int, head_channels: int, itemsize: int, device: torch.device
) -> Blocks:
    return forward(pairs, queries, keys, head_channels, itemsize, device)


def _enough(most: int, pairs: int, positions: int, device: torch.device) -> int:
    """Positions of a block: fewer where there would be fewer programs than multiprocessors, 16 at least.

    Interpreted, a program costs nearly the same whatever its size.
    """
    if INTERPRETED:
        return min(_block(positions), 256)
    block = most
    while block > 16 and pairs * cdiv(positions, block) < multiprocessors(device):
        block //= 2
    return block


def _block(positions: int) -> int:
    return max(next_power_of_2(positions), 16)
