"""How group_norm's kernels are launched: how a sample is cut into slices of channels and chunks of pixels.

A slice is a whole number of groups. Where its slab, all pixels of it, fits in the registers of a program, one launch
reads it once (`resident`); else every chunk of its pixels has a program, in two launches. What fits was found by
compiling: 64 float32 values a thread in 128 registers, so that two programs of 8 warps share a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffkern.ops._triton.launch import INTERPRETED, cdiv, multiprocessors, next_power_of_2

MOST_LANES = 2**15  # channels of a group; more leave no room in a tile

_SHARED_SLAB, _LONE_SLAB = 2**14, 2**15  # values: two programs a multiprocessor, or one
_TILE = 4096  # values of a tile where a slab takes many
_FEW_BYTES = 2**23  # of an input that lies in the second-level cache whatever the order of its reads
_MOST_CHUNKS = 64


@dataclass(frozen=True)
class Slabs:
    """width: channels of a slice. lanes: the same as a power of two. rows: pixels of a tile, a power of two.

    chunks: of a slab; tiles: of a chunk. A resident slab is one chunk of one tile.
    """

    width: int
    lanes: int
    rows: int
    tiles: int
    chunks: int
    resident: bool
    num_warps: int
    registers: int | None = None


def choose(
    samples: int,
    groups: int,
    per_group: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    device: torch.device,
    tensors: int = 1,
) -> Slabs:
    """For groups of per_group channels. tensors: how many values of each element a program has room for.

    Channels last, a slice is up to 128 bytes of a pixel and, but for small inputs, no less than 16; interpreted, a
    program costs the same whatever its size.
    """
    wanted = 1 if INTERPRETED else 2 * multiprocessors(device)
    small = samples * groups * per_group * pixels * itemsize <= _FEW_BYTES
    widths = [g * per_group for g in range(groups, 0, -1) if groups % g == 0]
    widths = [w for w in widths if w * itemsize <= (512 if INTERPRETED else 128)] or [per_group]
    rows = next_power_of_2(pixels)
    for most, least_bytes in ((_SHARED_SLAB // tensors, 16), (_LONE_SLAB // tensors, 32)):
        fitting = [w for w in widths if rows * next_power_of_2(w) <= most]
        if channels_last and not small:
            fitting = [w for w in fitting if w * itemsize >= least_bytes]
        if not channels_last and not INTERPRETED:  # a group's values lie together: no need of more than fill a program
            fitting = [w for w in fitting if rows * next_power_of_2(w) <= _TILE] or fitting[-1:]
        if fitting:
            enough = (w for w in fitting if samples * groups * per_group // w >= wanted)
            return _resident(next(enough, fitting[-1] if small else fitting[0]), rows, tensors)
    wide = [w for w in widths if samples * (groups * per_group // w) * _MOST_CHUNKS >= wanted] or widths[-1:]
    return _split(samples, groups * per_group, wide[0] if channels_last else per_group, pixels, wanted)


def _resident(width: int, rows: int, tensors: int) -> Slabs:
    lanes = next_power_of_2(width)
    values = rows * lanes * tensors
    num_warps = max(1, values // 2048 if values >= _SHARED_SLAB else min(values // 1024, 8))
    registers = 128 if values >= _SHARED_SLAB // 2 else None
    return Slabs(width, lanes, rows, 1, 1, True, num_warps, registers)


def _split(samples: int, channels: int, width: int, pixels: int, wanted: int) -> Slabs:
    lanes = next_power_of_2(width)
    rows = min(next_power_of_2(pixels), max(1, _TILE // lanes))
    tiles = cdiv(pixels, rows)
    chunks = min(cdiv(8 * wanted, samples * (channels // width)), _MOST_CHUNKS, tiles)
    tiles = cdiv(tiles, chunks)
    num_warps = min(max(rows * lanes // 512, 1), 32)
    return Slabs(width, lanes, rows, tiles, cdiv(pixels, rows * tiles), False, num_warps)
