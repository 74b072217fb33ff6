"""The backward kernels of linear_attention (docs/linear_attention.md). The arguments are in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops.linear_attention._triton.blocks import centered, key_and_value, load, softmax_of_columns, store


@triton.jit
def linear_attention_queries_backward_kernel(
    qkv,
    sample,
    head,
    channel,
    position,
    dout,
    dout_sample,
    dout_head,
    dout_channel,
    dout_position,
    context,
    dqkv,
    dqkv_sample,
    dqkv_head,
    dqkv_channel,
    dqkv_position,
    part_dcontext,
    scale,
    heads,
    channels,
    positions,
    chunks,
    chunk,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """dq of a chunk of positions, and what they give to the gradient of the context."""
    program = tl.program_id(0)
    both, number = program // chunks, program % chunks
    n, h = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    c, p = tl.arange(0, LANES), tl.arange(0, TILE)
    rows = c < channels
    of_head, _ = centered(context, both.to(tl.int64), c, c, channels)
    dcontext = tl.zeros([LANES, LANES], tl.float32)
    for tile in range(chunk):
        first = (number * chunk + tile) * TILE
        inside = rows[:, None] & (first + p < positions)[None, :]
        q = load(qkv + n * sample + h * head, first, c, p, channel, position, inside)
        dy = load(dout + n * dout_sample + h * dout_head, first, c, p, dout_channel, dout_position, inside)
        weights = softmax_of_columns(q, rows[:, None])
        dcontext += tl.dot(weights, tl.trans(dy), input_precision="ieee")
        g = tl.dot(of_head, dy, input_precision="ieee")
        along = tl.sum(weights * g, 0)
        dq = scale * weights * (g - along[None, :])
        store(dqkv + n * dqkv_sample + h * dqkv_head, first, c, p, dqkv_channel, dqkv_position, dq, inside)
    at = (program.to(tl.int64) * channels + c[:, None]) * channels + c[None, :]
    tl.store(part_dcontext + at, scale * dcontext, rows[:, None] & rows[None, :])


@triton.jit
def linear_attention_join_backward_kernel(
    part_dcontext,
    context,
    dcontext,
    along,
    channels,
    chunks,
    LANES: tl.constexpr,
):
    """The chunks of a head, in order, and the sums that the gradients of its keys take."""
    both = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LANES)
    rows = c < channels
    square = rows[:, None] & rows[None, :]
    of_head, _ = centered(context, both, c, c, channels)
    total = tl.zeros([LANES, LANES], tl.float32)
    for number in range(chunks):
        at = ((both * chunks + number) * channels + c[:, None]) * channels + c[None, :]
        total += tl.load(part_dcontext + at, square, other=0.0)
    tl.store(dcontext + (both * channels + c[:, None]) * channels + c[None, :], total, square)
    tl.store(along + both * channels + c, tl.sum(total * of_head, 1), rows)


@triton.jit
def linear_attention_keys_backward_kernel(
    qkv,
    sample,
    head,
    channel,
    position,
    memory,
    memory_part,
    memory_head,
    memory_channel,
    memory_position,
    context,
    k_max,
    k_sum,
    dcontext,
    along,
    dqkv,
    dqkv_sample,
    dqkv_head,
    dqkv_channel,
    dqkv_position,
    of_samples,
    heads,
    channels,
    positions,
    remembered,
    tiles,
    of_memory,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """dk and dv of a tile of positions, or what a sample gives to those of a tile of the memory."""
    program = tl.program_id(0)
    both, number = program // (tiles + of_memory), program % (tiles + of_memory)
    n, h = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    c, p = tl.arange(0, LANES), tl.arange(0, TILE)
    rows = c < channels
    row = both.to(tl.int64) * channels + c
    most, total = tl.load(k_max + row, rows, other=0.0), tl.load(k_sum + row, rows, other=1.0)
    of_rows = tl.load(along + row, rows, other=0.0)
    square = rows[:, None] & rows[None, :]
    gradient = tl.load(dcontext + (row * channels)[:, None] + c[None, :], square, other=0.0)
    _, mean = centered(context, both.to(tl.int64), c, c, channels)
    if number < tiles:
        first = number * TILE
        inside = rows[:, None] & (first + p < positions)[None, :]
        k, v = key_and_value(
            qkv, heads, n, h, sample, head, channel, position, memory, memory_part, memory_head, memory_channel,
            memory_position, first, c, p, inside, False,
        )  # fmt: skip
        dk, dv = _gradients(k, v, most, total, mean, gradient, of_rows)
        base = dqkv + n * dqkv_sample + h * dqkv_head
        store(base + heads * dqkv_head, first, c, p, dqkv_channel, dqkv_position, dk, inside)
        store(base + 2 * heads * dqkv_head, first, c, p, dqkv_channel, dqkv_position, dv, inside)
    elif memory is not None:
        first = (number - tiles) * TILE
        inside = rows[:, None] & (first + p < remembered)[None, :]
        k, v = key_and_value(
            qkv, heads, n, h, sample, head, channel, position, memory, memory_part, memory_head, memory_channel,
            memory_position, first, c, p, inside, True,
        )  # fmt: skip
        dk, dv = _gradients(k, v, most, total, mean, gradient, of_rows)
        of_keys = of_samples + (2 * n * heads + h) * channels * remembered
        store(of_keys, first, c, p, remembered, 1, dk, inside)
        store(of_keys + heads * channels * remembered, first, c, p, remembered, 1, dv, inside)


@triton.jit
def _gradients(k, v, most, total, mean, dcontext, along):
    """dk and dv (C, P) of a tile of keys and values."""
    weights = tl.exp(k - most[:, None]) / total[:, None]
    g = tl.dot(dcontext, v - mean[:, None], input_precision="ieee")
    dk = weights * (g - along[:, None])
    dv = tl.dot(tl.trans(dcontext), weights, input_precision="ieee")
    return dk, dv
