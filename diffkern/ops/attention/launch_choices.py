"""How attention's kernels are launched: how many queries and keys a program takes, and with how many threads.

What fits in the registers was found by compiling, first of all for sm_90, where blocks of 64 by 4 warps are multiplied
by whole warp groups; GPUs without them (before sm_90, and sm_120) take all operands from registers, of which eight
warps have enough. So was what float32 operands are multiplied with: three products in TF32 of their halves, right to
2⁻²¹ of a product, or, for heads whose halves do not fit, the plain arithmetic units ("ieee").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from diffkern.ops._triton.launch import (
    INTERPRETED,
    capability,
    cdiv,
    has_warp_groups,
    multiprocessors,
    next_power_of_2,
    shared_memory,
)

SHORT = 256  # keys of a row whose weights are multiplied as float32; tensor cores set no pace there
MOST_POSITIONS = 256  # of a block
MOST_CHANNELS = 512  # of a head; more have no room on chip
_PIECE = 128  # channels of a piece of a tile


@dataclass(frozen=True)
class Blocks:
    """rows: queries, keys: keys of a block, powers of two from 16 on. stages: blocks that a loop has in flight."""

    rows: int
    keys: int
    num_warps: int
    stages: int
    precision: str = "tf32x3"  # of products of float32


# By bytes of an element, for heads of up to so many channels.
_FORWARD = {
    2: {
        32: Blocks(64, 128, 4, 2),
        128: Blocks(64, 64, 4, 2),
        256: Blocks(32, 32, 8, 1),
        512: Blocks(32, 32, 8, 1),
    },
    4: {
        64: Blocks(64, 32, 4, 2),
        128: Blocks(32, 32, 8, 1),
        256: Blocks(32, 16, 8, 1, "ieee"),
        512: Blocks(16, 16, 8, 1, "ieee"),
    },
}
# 16 bits, many queries, more than SHORT keys.
_LONG = {128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 4, 2)}
_QUERY_GRADIENTS = {
    2: {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 32, 4, 2), 256: Blocks(32, 32, 8, 1), 512: Blocks(16, 32, 8, 1)},
    4: {64: Blocks(32, 32, 8, 2), 128: Blocks(16, 16, 8, 1), 512: Blocks(16, 16, 8, 1, "ieee")},
}
_KEY_GRADIENTS = {
    2: {64: Blocks(64, 64, 4, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(32, 32, 8, 1), 512: Blocks(16, 16, 8, 1)},
    4: {64: Blocks(32, 32, 8, 2), 128: Blocks(16, 16, 8, 1), 512: Blocks(16, 16, 8, 1, "ieee")},
}


def most_channels_backward(itemsize: int, device: torch.device) -> int:
    """Of a head: the two kernels ask for up to 130 KiB of shared memory a block, which sm_86, sm_89 and sm_120 lack."""
    fits = itemsize == 2 or shared_memory(capability(device)) >= 130 * 1024
    return MOST_CHANNELS if fits else 384


def pieces(head_channels: int, itemsize: int) -> tuple[tuple[int, int], ...]:
    """(first channel, width): as many of 128 as fit, and the rest in one or two powers of two.

    A second piece has a width beside which the compiler finds room for the first one's threads.
    """
    least = 16 if itemsize == 2 and head_channels <= _PIECE else 64
    found, first = [], 0
    while first < head_channels:
        left = head_channels - first
        width = min(max(next_power_of_2(left), least if first else 16), _PIECE)
        half = width // 2
        if half >= least and max(next_power_of_2(left - half), least) < half:
            width = half
        found.append((first, width))
        first += width
    return tuple(found)


def forward(pairs: int, queries: int, keys: int, head_channels: int, itemsize: int, device: torch.device) -> Blocks:
    """For `pairs` heads of all samples together."""
    chosen = _of(_FORWARD[itemsize], head_channels)
    if itemsize == 2 and keys > SHORT and head_channels <= max(_LONG):
        long = _of(_LONG, head_channels)
        chosen = (
            long
            if pairs * cdiv(queries, long.rows) >= multiprocessors(device)
            else replace(chosen, keys=min(chosen.keys, 64))
        )
    chosen = _of_registers(chosen, 64, head_channels, device)
    rows = _enough(chosen.rows, pairs, queries, device)
    fewer = 64 if head_channels <= 64 else 32  # so that four warps of few rows have registers
    return _fitting(chosen, queries, keys, rows, chosen.keys if rows >= 64 else min(chosen.keys, fewer))


def query_gradients(
    pairs: int, queries: int, keys: int, head_channels: int, itemsize: int, device: torch.device
) -> Blocks:
    chosen = _of_registers(_of(_QUERY_GRADIENTS[itemsize], head_channels), 64, head_channels, device)
    return _fitting(chosen, queries, keys, _enough(chosen.rows, pairs, queries, device), chosen.keys)


def key_gradients(
    pairs: int, queries: int, keys: int, head_channels: int, itemsize: int, device: torch.device
) -> Blocks:
    rows = 32 if head_channels <= 64 else 16
    chosen = _of_registers(_of(_KEY_GRADIENTS[itemsize], head_channels), rows, head_channels, device)
    return _fitting(chosen, queries, keys, chosen.rows, _enough(chosen.keys, pairs, keys, device))


def _of(table: dict[int, Blocks], head_channels: int) -> Blocks:
    return next(blocks for most, blocks in table.items() if head_channels <= most)


def _of_registers(blocks: Blocks, rows: int, head_channels: int, device: torch.device) -> Blocks:
    """Without warp groups a head of more than 32 channels takes eight warps and so many rows at most."""
    if head_channels <= 32 or has_warp_groups(device):
        return blocks
    return replace(blocks, rows=min(blocks.rows, rows), num_warps=8)


def _enough(most: int, pairs: int, positions: int, device: torch.device) -> int:
    """Positions of a program's own block: fewer where there would be fewer programs than multiprocessors.

    Interpreted, a program costs nearly the same whatever its size.
    """
    if INTERPRETED:
        return MOST_POSITIONS
    while most > 16 and pairs * cdiv(positions, most) < multiprocessors(device):
        most //= 2
    return most


def _fitting(blocks: Blocks, queries: int, keys: int, rows: int, of_keys: int) -> Blocks:
    """No more positions than there are, but 16 at least, as matrix products have it."""
    rows, of_keys = (max(min(most, next_power_of_2(n)), 16) for most, n in ((rows, queries), (of_keys, keys)))
    return replace(blocks, rows=rows, keys=of_keys)
