"""Tiles of pixels × channels, for what is summed over one of the two: their addresses in both memory formats.

Rows of a tile are pixels, columns (lanes) channels. Offsets within a tile are 32 bits along the pixels; what passes 2³¹
is in the base, or in the address of a channel's plane.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def addresses(base, n, first, p, c, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """(P, C): where channels c of the pixels first + p of sample n lie, in a dense tensor (N, channels, pixels).

    n, first: int64. p, c: int32 (P,) and (C,).
    """
    if CHANNELS_LAST:
        return base + (n * pixels + first) * channels + ((p * channels)[:, None] + c[None, :])
    return (base + n * channels * pixels + first) + (c.to(tl.int64) * pixels)[None, :] + p[:, None]


@triton.jit
def parameter(pointer, n, c, inside, sample_stride, channel_stride):
    """float32 (C,): sample n's values of a parameter (C,), whose sample_stride is 0, or (N, C); 0 outside."""
    return tl.load(pointer + n * sample_stride + c * channel_stride, inside, other=0.0).to(tl.float32)


@triton.jit
def affine(
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
    n,
    c,
    inside,
):
    """float32 (C,) each: weight, bias and 1 + scale of sample n, and weight·(1 + scale), bias·(1 + scale) + shift.

    Absent are a weight of 1 and a bias, scale and shift of 0.
    """
    w = tl.full(c.shape, 1.0, tl.float32)
    b = tl.zeros(c.shape, tl.float32)
    s = tl.full(c.shape, 1.0, tl.float32)
    if weight is not None:
        w = parameter(weight, n, c, inside, 0, weight_stride)
    if bias is not None:
        b = parameter(bias, n, c, inside, 0, bias_stride)
    if scale is not None:
        s = 1.0 + parameter(scale, n, c, inside, scale_sample, scale_channel)
    beta = tl.zeros(c.shape, tl.float32)
    if bias is not None:
        beta = b * s
    if shift is not None:
        beta += parameter(shift, n, c, inside, shift_sample, shift_channel)
    return w, b, s, w * s, beta


def per_channel(**parameters: Tensor | None) -> dict[str, Any]:
    """The kernels' arguments <name> and <name>_stride of parameters (C,), of any stride."""
    arguments: dict[str, Any] = {}
    for name, value in parameters.items():
        arguments |= {name: value, f"{name}_stride": 0 if value is None else value.stride(0)}
    return arguments


def per_sample(**parameters: Tensor | None) -> dict[str, Any]:
    """The kernels' arguments <name>, <name>_sample and <name>_channel of parameters (N, C), of any strides."""
    arguments: dict[str, Any] = {}
    for name, value in parameters.items():
        sample, channel = (0, 0) if value is None else value.stride()
        arguments |= {name: value, f"{name}_sample": sample, f"{name}_channel": channel}
    return arguments
