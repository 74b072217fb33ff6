"""Tiles (channels of a head, positions) of tensors in any strides, in float32, and what they pass through."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def addresses(base, c, p, channel, position):
    """(C, P). c, p: int32; p counts from a base that lies near it, so that its offsets are 32 bits."""
    return base + (c.to(tl.int64) * channel)[:, None] + (p * position)[None, :]


@triton.jit
def load(base, first, c, p, channel, position, inside):
    """Positions first + p of channels c; 0 outside."""
    at = addresses(base + first.to(tl.int64) * position, c, p, channel, position)
    return tl.load(at, inside, other=0.0).to(tl.float32)


@triton.jit
def store(base, first, c, p, channel, position, value, inside):
    tl.store(addresses(base + first.to(tl.int64) * position, c, p, channel, position), value, inside)


@triton.jit
def key_and_value(
    qkv, heads, n, h, sample, head, channel, position, memory, memory_part, memory_head, memory_channel,
    memory_position, first, c, p, inside, OF_MEMORY: tl.constexpr,
):  # fmt: skip
    """The tiles of keys and values, of the memory or of sample n."""
    if OF_MEMORY:
        base = memory + h * memory_head
        k = load(base, first, c, p, memory_channel, memory_position, inside)
        v = load(base + memory_part, first, c, p, memory_channel, memory_position, inside)
    else:
        base = qkv + n * sample + h * head
        k = load(base + heads * head, first, c, p, channel, position, inside)
        v = load(base + 2 * heads * head, first, c, p, channel, position, inside)
    return k, v


@triton.jit
def softmax_of_columns(x, rows):
    """The softmax over the first axis, of which `rows` (C, 1) are there."""
    x = tl.where(rows, x, -float("inf"))
    e = tl.exp(x - tl.max(x, 0)[None, :])
    return e / tl.sum(e, 0)[None, :]


@triton.jit
def centered(context, head, d, e, channels):
    """A head's context (C, C), less the mean of each of its columns, where that is finite; and these means (C,)."""
    inside = (d < channels)[:, None] & (e < channels)[None, :]
    value = tl.load(context + (head * channels + d[:, None]) * channels + e[None, :], inside, other=0.0)
    mean = tl.sum(value, 0) / channels
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
    return tl.where(inside, value - mean[None, :], 0.0), mean
