"""How linear_attention's kernels are launched: a program has all channels of a head, and tiles of its positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffkern.ops._triton.launch import INTERPRETED, cdiv, multiprocessors, next_power_of_2

MOST_LANES = 64  # channels of a head; the square of more does not fit a program's registers


@dataclass(frozen=True)
class Tiles:
    """lanes: a head's channels, and tile: positions, as powers of two that products take. chunk: tiles of a program.

    tiles, chunks: of a head's positions. of_memory: the tiles of the memory, a chunk of their own.
    """

    lanes: int
    tile: int
    chunk: int
    tiles: int
    chunks: int
    of_memory: int
    num_warps: int


def choose(heads: int, channels: int, positions: int, remembered: int, device: torch.device) -> Tiles:
    """`heads`: of all samples. As few chunks, whose sums are written and joined, as keep the device busy."""
    lanes = max(next_power_of_2(channels), 16)
    tile = min(max(next_power_of_2(positions), 16), 64 if lanes <= 32 else 16)
    tiles = cdiv(positions, tile)
    wanted = 2 * heads if INTERPRETED else 4 * multiprocessors(device)
    chunk = cdiv(tiles, min(cdiv(wanted, heads), tiles))
    return Tiles(lanes, tile, chunk, tiles, cdiv(tiles, chunk), cdiv(remembered, tile), 4 if lanes <= 32 else 8)
