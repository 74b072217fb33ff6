"""What group_norm's kernels share: a tile of two joined tensors, and sums over the channels of a group."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.channels import addresses


@triton.jit
def load(
    x, skip, n, first, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST: tl.constexpr, SKIP: tl.constexpr
):
    """(P, C) of cat([x, skip], 1), as stored; 0 outside."""
    if SKIP:
        of_x = addresses(x, n, first, p, c, pixels, x_channels, CHANNELS_LAST)
        of_skip = addresses(skip, n, first, p, c - x_channels, pixels, channels - x_channels, CHANNELS_LAST)
        value = tl.load(of_x, inside & (c < x_channels)[None, :], other=0.0)
        return tl.load(of_skip, inside & (c >= x_channels)[None, :], other=value)
    return tl.load(addresses(x, n, first, p, c, pixels, channels, CHANNELS_LAST), inside, other=0.0)


@triton.jit
def store(
    dx,
    dskip,
    value,
    n,
    first,
    p,
    c,
    inside,
    pixels,
    x_channels,
    channels,
    CHANNELS_LAST: tl.constexpr,
    SKIP: tl.constexpr,
):
    """The other way round: into the two tensors that were joined."""
    if SKIP:
        of_x = addresses(dx, n, first, p, c, pixels, x_channels, CHANNELS_LAST)
        of_skip = addresses(dskip, n, first, p, c - x_channels, pixels, channels - x_channels, CHANNELS_LAST)
        tl.store(of_x, value, inside & (c < x_channels)[None, :])
        tl.store(of_skip, value, inside & (c >= x_channels)[None, :])
    else:
        tl.store(addresses(dx, n, first, p, c, pixels, channels, CHANNELS_LAST), value, inside)


@triton.jit
def over_group(value, group, ONE_GROUP: tl.constexpr):
    """(C,): for every channel the sum of `value` over the channels of its group. Other groups' NaN stay theirs."""
    if ONE_GROUP:
        return tl.sum(tl.where(group == 0, value, 0.0), 0) + tl.zeros_like(value)
    return tl.sum(tl.where(group[:, None] == group[None, :], value[None, :], 0.0), 1)


@triton.jit
def place(
    program,
    slices,
    chunks,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(n, chunk, c, p, of_lanes, group) of a program: its sample as int64, its chunk and channels, the rows of a tile.

    of_lanes: (LANES,), which of the channels c are the slice's; group: counted within the slice.
    """
    lane = tl.arange(0, LANES)
    n = (program // (slices * chunks)).to(tl.int64)
    slab = program % (slices * chunks)
    c = slab // chunks * WIDTH + lane
    return n, slab % chunks, c, tl.arange(0, ROWS), lane < WIDTH, lane // PER_GROUP
