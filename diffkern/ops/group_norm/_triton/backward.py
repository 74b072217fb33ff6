"""The kernels of group_norm's backward pass (docs/group_norm.md). What the arguments are stands in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import sigmoid
from diffkern.ops._triton.channels import addresses, affine, parameter
from diffkern.ops.group_norm._triton.tile import load, over_group, place, store


@triton.jit
def _tile_gradients(xhat, dy, gamma, beta, SILU: tl.constexpr):
    """dz, the gradient before the activation."""
    if SILU:
        z = xhat * gamma[None, :] + beta[None, :]
        s = sigmoid(z)
        return dy * (s + s * z * (1.0 - s))
    return dy


@triton.jit
def _finish(
    sum_dz,
    sum_dz_xhat,
    sum_xhat,
    w,
    b,
    s,
    gamma,
    rstd,
    mean_dxhat,
    mean_dxhat_xhat,
    of_weight,
    of_bias,
    dscale,
    dshift,
    doffset,
    n,
    c,
    inside,
    pixels,
    channels,
):
    """Writes what one sample gives to the gradients of the parameters, each where it is asked for."""
    at = n * channels + c
    if of_weight is not None:
        tl.store(of_weight + at, s * sum_dz_xhat, inside)
    if of_bias is not None:
        tl.store(of_bias + at, s * sum_dz, inside)
    if dscale is not None:
        tl.store(dscale + at, w * sum_dz_xhat + b * sum_dz, inside)
    if dshift is not None:
        tl.store(dshift + at, sum_dz, inside)
    if doffset is not None:
        projected = pixels * mean_dxhat + sum_xhat * mean_dxhat_xhat
        tl.store(doffset + at, rstd * (gamma * sum_dz - projected), inside)


@triton.jit
def group_norm_backward_kernel(
    x,
    skip,
    dy,
    mean_in,
    rstd_in,
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
    dx,
    dskip,
    of_weight,
    of_bias,
    dscale,
    dshift,
    doffset,
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
    ONE_GROUP: tl.constexpr,
):
    """A slab of x and dy in registers."""
    n, _, c, p, of_lanes, group = place(tl.program_id(0), slices, 1, PER_GROUP, WIDTH, LANES, ROWS)
    inside = (p < pixels)[:, None] & of_lanes[None, :]
    statistics = n * (channels // PER_GROUP) + c // PER_GROUP
    mean = tl.load(mean_in + statistics, of_lanes, other=0.0)
    rstd = tl.load(rstd_in + statistics, of_lanes, other=0.0)
    w, b, s, gamma, beta = affine(
        weight, weight_stride, bias, bias_stride, scale, scale_sample, scale_channel, shift, shift_sample,
        shift_channel, n, c, of_lanes,
    )  # fmt: skip
    v = load(x, skip, n, 0, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP).to(tl.float32)
    if offset is not None:
        v += parameter(offset, n, c, of_lanes, offset_sample, offset_channel)[None, :]
    xhat = (v - mean[None, :]) * rstd[None, :]
    of_dy = addresses(dy, n, 0, p, c, pixels, channels, CHANNELS_LAST)
    dz = _tile_gradients(xhat, tl.load(of_dy, inside, other=0.0).to(tl.float32), gamma, beta, SILU)
    sum_dz = tl.sum(dz, 0)
    sum_dz_xhat = tl.sum(dz * xhat, 0)
    sum_xhat = sum_dz
    if doffset is not None:
        sum_xhat = tl.sum(tl.where((p < pixels)[:, None], xhat, 0.0), 0)
    m1 = over_group(gamma * sum_dz, group, ONE_GROUP) / values
    m2 = over_group(gamma * sum_dz_xhat, group, ONE_GROUP) / values
    _finish(
        sum_dz, sum_dz_xhat, sum_xhat, w, b, s, gamma, rstd, m1, m2, of_weight, of_bias, dscale, dshift, doffset,
        n, c, of_lanes, values / PER_GROUP, channels,
    )  # fmt: skip
    gradient = dz * (gamma * rstd)[None, :] - (xhat * (m2 * rstd)[None, :] + (m1 * rstd)[None, :])
    store(dx, dskip, gradient, n, 0, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP)


@triton.jit
def group_norm_backward_partials_kernel(
    x,
    skip,
    dy,
    mean_in,
    rstd_in,
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
    sums_dz,
    sums_dz_xhat,
    sums_xhat,
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
    SILU: tl.constexpr,
):
    """Each channel's sums over the pixels of a chunk, to (N, chunks, C)."""
    n, chunk, c, p, of_lanes, _ = place(tl.program_id(0), slices, chunks, PER_GROUP, WIDTH, LANES, ROWS)
    statistics = n * (channels // PER_GROUP) + c // PER_GROUP
    mean = tl.load(mean_in + statistics, of_lanes, other=0.0)
    rstd = tl.load(rstd_in + statistics, of_lanes, other=0.0)
    _, _, _, gamma, beta = affine(
        weight, weight_stride, bias, bias_stride, scale, scale_sample, scale_channel, shift, shift_sample,
        shift_channel, n, c, of_lanes,
    )  # fmt: skip
    added = tl.zeros([LANES], tl.float32)
    if offset is not None:
        added = parameter(offset, n, c, of_lanes, offset_sample, offset_channel)
    of_dz = tl.zeros([ROWS, LANES], tl.float32)
    of_dz_xhat = tl.zeros([ROWS, LANES], tl.float32)
    of_xhat = tl.zeros([ROWS, LANES], tl.float32)
    for tile in tl.range(0, tiles, num_stages=3):
        at = (chunk.to(tl.int64) * tiles + tile) * ROWS
        of_rows = p < pixels - at
        inside = of_rows[:, None] & of_lanes[None, :]
        v = load(x, skip, n, at, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP).to(tl.float32)
        of_dy = addresses(dy, n, at, p, c, pixels, channels, CHANNELS_LAST)
        gradient = tl.load(of_dy, inside, other=0.0).to(tl.float32)
        if offset is not None:
            v += added[None, :]
        xhat = (v - mean[None, :]) * rstd[None, :]
        dz = _tile_gradients(xhat, gradient, gamma, beta, SILU)
        of_dz += dz
        of_dz_xhat += dz * xhat
        if sums_xhat is not None:
            of_xhat += tl.where(of_rows[:, None], xhat, 0.0)
    to = (n * chunks + chunk) * channels + c
    tl.store(sums_dz + to, tl.sum(of_dz, 0), of_lanes)
    tl.store(sums_dz_xhat + to, tl.sum(of_dz_xhat, 0), of_lanes)
    if sums_xhat is not None:
        tl.store(sums_xhat + to, tl.sum(of_xhat, 0), of_lanes)


@triton.jit
def group_norm_backward_apply_kernel(
    x,
    skip,
    dy,
    mean_in,
    rstd_in,
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
    sums_dz,
    sums_dz_xhat,
    sums_xhat,
    dx,
    dskip,
    of_weight,
    of_bias,
    dscale,
    dshift,
    doffset,
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
    ONE_GROUP: tl.constexpr,
):
    """Adds the chunks' sums, and writes a chunk of dx. The last chunks, just read, go first."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n, chunk, c, p, of_lanes, group = place(program, slices, chunks, PER_GROUP, WIDTH, LANES, ROWS)
    k = tl.arange(0, CHUNKS)
    partials = ((n * chunks + k) * channels)[:, None] + c[None, :]
    read = (k < chunks)[:, None] & of_lanes[None, :]
    sum_dz = tl.sum(tl.load(sums_dz + partials, read, other=0.0), 0)
    sum_dz_xhat = tl.sum(tl.load(sums_dz_xhat + partials, read, other=0.0), 0)
    sum_xhat = sum_dz
    if sums_xhat is not None:
        sum_xhat = tl.sum(tl.load(sums_xhat + partials, read, other=0.0), 0)
    statistics = n * (channels // PER_GROUP) + c // PER_GROUP
    mean = tl.load(mean_in + statistics, of_lanes, other=0.0)
    rstd = tl.load(rstd_in + statistics, of_lanes, other=0.0)
    w, b, s, gamma, beta = affine(
        weight, weight_stride, bias, bias_stride, scale, scale_sample, scale_channel, shift, shift_sample,
        shift_channel, n, c, of_lanes,
    )  # fmt: skip
    m1 = over_group(gamma * sum_dz, group, ONE_GROUP) / values
    m2 = over_group(gamma * sum_dz_xhat, group, ONE_GROUP) / values
    if chunk == 0:
        _finish(
            sum_dz, sum_dz_xhat, sum_xhat, w, b, s, gamma, rstd, m1, m2, of_weight, of_bias, dscale, dshift, doffset,
            n, c, of_lanes, values / PER_GROUP, channels,
        )  # fmt: skip
    added = tl.zeros([LANES], tl.float32)
    if offset is not None:
        added = parameter(offset, n, c, of_lanes, offset_sample, offset_channel)
    for tile in tl.range(0, tiles, num_stages=3):
        at = (chunk.to(tl.int64) * tiles + tile) * ROWS
        inside = (p < pixels - at)[:, None] & of_lanes[None, :]
        v = load(x, skip, n, at, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP).to(tl.float32)
        of_dy = addresses(dy, n, at, p, c, pixels, channels, CHANNELS_LAST)
        gradient = tl.load(of_dy, inside, other=0.0).to(tl.float32)
        if offset is not None:
            v += added[None, :]
        xhat = (v - mean[None, :]) * rstd[None, :]
        dz = _tile_gradients(xhat, gradient, gamma, beta, SILU)
        gradient = dz * (gamma * rstd)[None, :] - (xhat * (m2 * rstd)[None, :] + (m1 * rstd)[None, :])
        store(dx, dskip, gradient, n, at, p, c, inside, pixels, x_channels, channels, CHANNELS_LAST, SKIP)
