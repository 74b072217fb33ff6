"""Sums over the elements of each sample, in an order that depends on the sample's shape alone.

A sample is cut into segments of a few tiles. A program adds up the tiles of a segment lane by lane in float32, joins
the lanes, and stores the segment's sum; the last program of a sample joins the segments. How many segments a program
has changes nothing in the result, so that a batch of one can be spread over a GPU and a large one need not be.
Which program is last is said by an integer that they count up; no float is ever added to memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from diffkern.ops._triton.elementwise import Elementwise, SampleShape, shape_tiling
from diffkern.ops._triton.launch import INTERPRETED, cdiv, multiprocessors, next_power_of_2, tickets

FINAL_LANES = tl.constexpr(128)  # side by side where segments are joined


@triton.jit
def share(program, parts, segments, per_program):
    """(n, first, end): the sample, int64, and the segments of program number `program`; a sample has `parts`."""
    first = program % parts * per_program
    return (program // parts).to(tl.int64), first, tl.minimum(first + per_program, segments)


@triton.jit
def total(values, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """The sum of values (SIZE,), SIZE = 2^STEPS, pair by pair.

    tl.sum of them all would go by the threads that have them, and so by dtypes and alignment.
    """
    for step in tl.static_range(1, STEPS):
        values = tl.sum(tl.reshape(values, [SIZE >> step, 2]), 1)
    return tl.sum(values, 0)


@triton.jit
def is_last(counters, n, parts, SPLIT: tl.constexpr):
    """Whether this program is the last of its sample, whose sums then are all in memory for all its threads."""
    tl.debug_barrier()
    last = True
    if SPLIT:
        last = tl.atomic_add(counters + n, 1, sem="acq_rel") == parts - 1
        if last:
            tl.store(counters + n, 0)
    return last


@triton.jit
def joined(sums, segments):
    """float64, from the sums of a sample's segments: a handful of additions, in which many values lose no digits."""
    lanes = tl.zeros([FINAL_LANES], tl.float64)
    for first in range(0, segments, FINAL_LANES):
        index = first + tl.arange(0, FINAL_LANES)
        # From L2: other programs wrote them.
        lanes += tl.load(sums + index, index < segments, other=0.0, cache_modifier=".cg").to(tl.float64)
    return total(lanes, FINAL_LANES, 7)


@dataclass(frozen=True)
class Segmented:
    """elements: of a tile, a power of two. num_warps: of a program. tiles: of a segment."""

    elements: int
    num_warps: int
    tiles: int


def choose(size: int, count: int) -> Segmented:
    """For `count` sums of samples of `size` elements, whatever their number: a result must not depend on it.

    Few tiles a segment leave a single sample work for many programs; eight at most are added up in float32. Kernels
    with several sums have much in registers, so that their threads take half as many elements.
    Interpreted, a tile costs the same whatever its size.
    """
    elements = min(max(next_power_of_2(size), 1024), 2**15) if INTERPRETED else 1024
    tiles = 1
    while tiles < 8 and size > 64 * tiles * elements:
        tiles *= 2
    return Segmented(elements, 4 if count == 1 else 8, tiles)


def segments_per_program(samples: int, segments: int, device: torch.device) -> int:
    """As many as leave each multiprocessor 24 programs, more than it runs at once; all of them in a large batch."""
    return min(max(samples * segments // (24 * multiprocessors(device)), 1), segments)


@dataclass(frozen=True)
class Reduction:
    """How the samples of a tensor are summed: the kernel's `arguments`, and `programs`, the size of the grid."""

    programs: int
    num_warps: int
    arguments: dict[str, Any]


def reduction(shape: SampleShape, device: torch.device, generates: bool, count: int = 1) -> Reduction:
    """Of `count` sums a sample, for operands of the shape and memory order; `generates` is tiling's.

    Among the arguments `sums` is the workspace, float32 (count, N, segments), and `counters` (N,) what is_last wants.
    """
    samples, channels, pixels, _ = shape
    chosen = choose(channels * pixels, count)
    tiles = shape_tiling(shape, generates, Elementwise(chosen.elements, chosen.num_warps)).arguments
    segments = max(cdiv(tiles["blocks"], chosen.tiles), 1)  # an empty sample has one, of nothing
    per_program = segments_per_program(samples, segments, device)
    parts = cdiv(segments, per_program)
    arguments = {
        **tiles,
        "sums": torch.empty((count, samples, segments), dtype=torch.float32, device=device),
        "counters": tickets(samples, device) if parts > 1 else None,
        "segments": segments,
        "parts": parts,
        "per_program": per_program,
        "TILES": chosen.tiles,
        "STEPS": chosen.elements.bit_length() - 1,
        "SPLIT": parts > 1,
    }
    return Reduction(samples * parts, chosen.num_warps, arguments)
