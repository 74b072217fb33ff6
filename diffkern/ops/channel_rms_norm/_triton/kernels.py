"""The kernels of channel_rms_norm (docs/channel_rms_norm.md). What the arguments are stands in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import sigmoid
from diffkern.ops._triton.channels import addresses, affine


@triton.jit
def _scaled_norm(x):
    """The norm where squares leave the range of float32: by a power of two near the largest value of the pixel."""
    largest = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(largest, 1 << 23), 253 << 23)
    scaled = x * ((254 << 23) - power).to(tl.float32, bitcast=True)[:, None]
    return tl.sqrt(tl.sum(scaled * scaled, 1)) * power.to(tl.float32, bitcast=True)


@triton.jit
def channel_rms_norm_kernel(
    x,
    weight,
    weight_stride,
    scale,
    scale_sample,
    scale_channel,
    shift,
    shift_sample,
    shift_channel,
    y,
    norm_out,
    eps,
    root,
    pixels,
    channels,
    chunks,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """A tile of pixels with all their channels."""
    program = tl.program_id(0)
    n = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * ROWS
    p, c = tl.arange(0, ROWS), tl.arange(0, LANES)
    of_rows, of_lanes = p < pixels - first, c < channels
    inside = of_rows[:, None] & of_lanes[None, :]
    v = tl.load(addresses(x, n, first, p, c, pixels, channels, CHANNELS_LAST), inside, other=0.0).to(tl.float32)
    squares = tl.sum(v * v, 1)
    norm = tl.sqrt(squares)
    right = (squares >= 1e-30) & (squares <= 1e38)
    if tl.min((right | (p >= pixels - first)).to(tl.int32), 0) == 0:
        norm = tl.where(right, norm, _scaled_norm(v))
    tl.store(norm_out + n * pixels + first + p, norm, of_rows)
    reciprocal = 1.0 / tl.maximum(norm, eps, propagate_nan=tl.PropagateNan.ALL)
    _, _, _, gamma, beta = affine(
        weight, weight_stride, None, 0, scale, scale_sample, scale_channel, shift, shift_sample, shift_channel,
        n, c, of_lanes,
    )  # fmt: skip
    z = v * reciprocal[:, None] * (root * gamma)[None, :] + beta[None, :]
    if SILU:
        z *= sigmoid(z)
    tl.store(addresses(y, n, first, p, c, pixels, channels, CHANNELS_LAST), z, inside)


@triton.jit
def channel_rms_norm_backward_kernel(
    x,
    dy,
    norm_in,
    weight,
    weight_stride,
    scale,
    scale_sample,
    scale_channel,
    shift,
    shift_sample,
    shift_channel,
    dx,
    of_weight,
    of_scale,
    of_shift,
    eps,
    root,
    pixels,
    channels,
    chunks,
    tiles,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    SUMS: tl.constexpr,
):
    """dx of a chunk of pixels, and what the chunk gives to the gradients of the parameters, each to (N, chunks, C)."""
    program = tl.program_id(0)
    n = (program // chunks).to(tl.int64)
    chunk = program % chunks
    p, c = tl.arange(0, ROWS), tl.arange(0, LANES)
    of_lanes = c < channels
    w, _, s, gamma, beta = affine(
        weight, weight_stride, None, 0, scale, scale_sample, scale_channel, shift, shift_sample, shift_channel,
        n, c, of_lanes,
    )  # fmt: skip
    gamma *= root
    of_dz = tl.zeros([ROWS, LANES], tl.float32)
    of_dz_u = tl.zeros([ROWS, LANES], tl.float32)
    for tile in range(tiles):
        first = (chunk.to(tl.int64) * tiles + tile) * ROWS
        of_rows = p < pixels - first
        inside = of_rows[:, None] & of_lanes[None, :]
        v = tl.load(addresses(x, n, first, p, c, pixels, channels, CHANNELS_LAST), inside, other=0.0).to(tl.float32)
        dz = tl.load(addresses(dy, n, first, p, c, pixels, channels, CHANNELS_LAST), inside, other=0.0).to(tl.float32)
        norm = tl.load(norm_in + n * pixels + first + p, of_rows, other=1.0)
        reciprocal = 1.0 / tl.maximum(norm, eps, propagate_nan=tl.PropagateNan.ALL)
        u = v * reciprocal[:, None]
        if SILU:
            z = u * gamma[None, :] + beta[None, :]
            activated = sigmoid(z)
            dz *= activated + activated * z * (1.0 - activated)
        du = dz * gamma[None, :]
        along = tl.where(norm < eps, 0.0, tl.sum(du * u, 1))
        gradient = (du - u * along[:, None]) * reciprocal[:, None]
        tl.store(addresses(dx, n, first, p, c, pixels, channels, CHANNELS_LAST), gradient, inside)
        if SUMS:
            of_dz += dz
            of_dz_u += dz * u
    if SUMS:
        sum_dz_u = root * tl.sum(of_dz_u, 0)
        to = (n * chunks + chunk) * channels + c
        if of_weight is not None:
            tl.store(of_weight + to, s * sum_dz_u, of_lanes)
        if of_scale is not None:
            tl.store(of_scale + to, w * sum_dz_u, of_lanes)
        if of_shift is not None:
            tl.store(of_shift + to, tl.sum(of_dz, 0), of_lanes)
