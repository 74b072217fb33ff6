"""The kernels of group_norm's forward pass. What the arguments are stands in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import sigmoid
from diffkern.ops._triton.channels import affine, parameter
from diffkern.ops.group_norm._triton.tile import load, over_group, place, store


@triton.jit
def group_norm_kernel(
    x,
    skip,
    weight,
    weight_stride,
    bias,
    bias_stride,
    scale,
    scale_sample,
    scale_channel,
    shift,
    shift_sample,
    shift_channel,
    offset,
    offset_sample,
    offset_channel,
    y,
    mean_out,
    rstd_out,
    eps,
    values,
    pixels,
    x_channels,
    channels,
    slices,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SKIP: tl.constexpr,
    SILU: tl.constexpr,
    PADDED: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    """A slab in registers: the mean, then the centred squares, with the mean put right by what centring left."""
    n, _, c, p, of_lanes, group = place(tl.program_id(0), slices, 1, PER_GROUP, WIDTH, LANES, ROWS)
    of_rows = p < pixels
    inside = of_rows[:, None] & of_lanes[None, :]
    v = load(x, skip, n, 0, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP).to(tl.float32)
    if offset is not None:
        v += parameter(offset, n, c, of_lanes, offset_sample, offset_channel)[None, :]
        if PADDED:
            v = tl.where(of_rows[:, None], v, 0.0)
    mean = over_group(tl.sum(v, 0), group, ONE_GROUP) / values
    d = v - mean[None, :]
    if PADDED:
        d = tl.where(of_rows[:, None], d, 0.0)
    rest = over_group(tl.sum(d, 0), group, ONE_GROUP) / values
    squares = over_group(tl.sum(d * d, 0), group, ONE_GROUP) / values
    rstd = tl.rsqrt(tl.maximum(squares - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    _, _, _, gamma, beta = affine(
        weight, weight_stride, bias, bias_stride, scale, scale_sample, scale_channel, shift, shift_sample,
        shift_channel, n, c, of_lanes,
    )  # fmt: skip
    gamma *= rstd
    z = d * gamma[None, :] + (beta - rest * gamma)[None, :]
    if SILU:
        z *= sigmoid(z)
    store(y, None, z, n, 0, p, c, inside, pixels, channels, channels, CHANNELS_LAST, False)
    statistics = n * (channels // PER_GROUP) + c // PER_GROUP
    first = of_lanes & (c % PER_GROUP == 0)
    tl.store(mean_out + statistics, mean + rest, first)
    tl.store(rstd_out + statistics, rstd, first)


@triton.jit
def group_norm_partials_kernel(
    x,
    skip,
    offset,
    offset_sample,
    offset_channel,
    means,
    squares,
    pixels,
    x_channels,
    channels,
    slices,
    chunks,
    tiles,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SKIP: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    """The mean and the sum of centred squares of each group in a chunk of pixels, to (N, G, chunks).

    Every element of the tile has a mean of its own (Welford 1962), and all are joined at the end.
    """
    n, chunk, c, p, of_lanes, group = place(tl.program_id(0), slices, chunks, PER_GROUP, WIDTH, LANES, ROWS)
    first = chunk.to(tl.int64) * tiles * ROWS
    here = tl.minimum(pixels - first, tiles * ROWS).to(tl.int32)
    added = tl.zeros([LANES], tl.float32)
    if offset is not None:
        added = parameter(offset, n, c, of_lanes, offset_sample, offset_channel)
    mean = tl.zeros([ROWS, LANES], tl.float32)
    m2 = tl.zeros([ROWS, LANES], tl.float32)
    count = tl.zeros((), tl.float32)
    for tile in tl.range(0, tiles, num_stages=3):
        of_rows = p < here - tile * ROWS
        inside = of_rows[:, None] & of_lanes[None, :]
        v = load(
            x, skip, n, first + tile * ROWS, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP
        ).to(tl.float32)  # fmt: skip
        if offset is not None:
            v += added[None, :]
        count += 1.0
        d = tl.where(of_rows[:, None], v - mean, 0.0)
        mean += d * (1.0 / count)
        m2 += d * (v - mean)
    counts = (tl.maximum(here - p + ROWS - 1, 0) // ROWS).to(tl.float32)[:, None]
    values = here.to(tl.float32) * PER_GROUP
    centre = over_group(tl.sum(counts * mean, 0), group, ONE_GROUP) / values
    d = mean - centre[None, :]
    rest = over_group(tl.sum(counts * d, 0), group, ONE_GROUP) / values
    total = over_group(tl.sum(m2 + counts * d * d, 0), group, ONE_GROUP) - values * rest * rest
    place_of = (n * (channels // PER_GROUP) + c // PER_GROUP) * chunks + chunk
    first_of_group = of_lanes & (c % PER_GROUP == 0)
    tl.store(means + place_of, centre + rest, first_of_group)
    tl.store(squares + place_of, total, first_of_group)


@triton.jit
def group_norm_apply_kernel(
    x,
    skip,
    weight,
    weight_stride,
    bias,
    bias_stride,
    scale,
    scale_sample,
    scale_channel,
    shift,
    shift_sample,
    shift_channel,
    offset,
    offset_sample,
    offset_channel,
    means,
    squares,
    y,
    mean_out,
    rstd_out,
    eps,
    values,
    pixels,
    x_channels,
    channels,
    slices,
    chunks,
    tiles,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SKIP: tl.constexpr,
    SILU: tl.constexpr,
):
    """Joins the chunks' statistics (Chan et al. 1983) and normalises a chunk. The last chunks, just read, go first."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n, chunk, c, p, of_lanes, _ = place(program, slices, chunks, PER_GROUP, WIDTH, LANES, ROWS)
    k = tl.arange(0, CHUNKS)
    statistics = n * (channels // PER_GROUP) + c // PER_GROUP
    partials = (statistics * chunks)[None, :] + k[:, None]
    read = (k < chunks)[:, None] & of_lanes[None, :]
    of_chunks = tl.load(means + partials, read, other=0.0)
    m2 = tl.load(squares + partials, read, other=0.0)
    whole = tiles * ROWS
    share = tl.minimum(tl.maximum(pixels - k.to(tl.int64) * whole, 0), whole).to(tl.float32)[:, None] * PER_GROUP
    mean = tl.sum(share * of_chunks, 0) / values
    d = of_chunks - mean[None, :]
    rest = tl.sum(share * d, 0) / values
    variance = tl.sum(m2 + share * d * d, 0) / values - rest * rest
    rstd = tl.rsqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    mean += rest
    if chunk == 0:
        first_of_group = of_lanes & (c % PER_GROUP == 0)
        tl.store(mean_out + statistics, mean, first_of_group)
        tl.store(rstd_out + statistics, rstd, first_of_group)
    _, _, _, gamma, beta = affine(
        weight, weight_stride, bias, bias_stride, scale, scale_sample, scale_channel, shift, shift_sample,
        shift_channel, n, c, of_lanes,
    )  # fmt: skip
    gamma *= rstd
    first = chunk.to(tl.int64) * whole
    added = tl.zeros([LANES], tl.float32)
    if offset is not None:
        added = parameter(offset, n, c, of_lanes, offset_sample, offset_channel)
    for tile in tl.range(0, tiles, num_stages=3):
        at = first + tile * ROWS
        inside = (p < pixels - at)[:, None] & of_lanes[None, :]
        v = load(x, skip, n, at, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP).to(tl.float32)
        if offset is not None:
            v += added[None, :]
        z = (v - mean[None, :]) * gamma[None, :] + beta[None, :]
        if SILU:
            z *= sigmoid(z)
        store(y, None, z, n, at, p, c, inside, pixels, channels, channels, CHANNELS_LAST, False)
