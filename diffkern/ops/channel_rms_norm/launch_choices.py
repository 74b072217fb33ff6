"""How channel_rms_norm's kernels are launched: a program has all channels of a few pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffkern.ops._triton.launch import INTERPRETED, cdiv, multiprocessors, next_power_of_2

MOST_LANES = 2**15  # channels of a pixel; more leave no room in a tile

_TILE = 4096
_MOST = 8192  # values of x, and as many of dy; twice that spills


@dataclass(frozen=True)
class Rows:
    """lanes: channels as a power of two. rows: pixels of a tile. tiles: of a chunk; chunks: of a sample."""

    lanes: int
    rows: int
    tiles: int
    chunks: int
    num_warps: int


def forward(channels: int, pixels: int, itemsize: int, channels_last: bool) -> Rows:
    """A program a tile, 32 values a thread."""
    lanes, rows = _tile(channels, pixels, itemsize, channels_last)
    return Rows(lanes, rows, 1, cdiv(pixels, rows), min(max(lanes * rows // 1024, 1), 32))


def backward(
    samples: int, channels: int, pixels: int, itemsize: int, channels_last: bool, device: torch.device
) -> Rows:
    """A program several tiles, whose sums over the pixels it keeps: as few programs as keep the device busy."""
    lanes, rows = _tile(channels, pixels, itemsize, channels_last)
    rows = max(min(rows, _MOST // lanes), 1)
    all_tiles = cdiv(pixels, rows)
    wanted = 1 if INTERPRETED else 4 * multiprocessors(device)
    tiles = cdiv(all_tiles, min(cdiv(wanted, samples), all_tiles))
    return Rows(lanes, rows, tiles, cdiv(all_tiles, tiles), min(max(lanes * rows // 512, 1), 32))


def _tile(channels: int, pixels: int, itemsize: int, channels_last: bool) -> tuple[int, int]:
    """(lanes, rows). In a contiguous tensor a row of pixels is no less than a sector of memory, 32 bytes."""
    lanes = next_power_of_2(channels)
    rows = min(_TILE // lanes, 256)
    if not channels_last and lanes <= 2048:
        rows = max(rows, 32 // itemsize)
    return lanes, min(max(rows, 1), next_power_of_2(pixels))
