"""The forward kernels of linear_attention (docs/linear_attention.md). What the arguments are stands in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops.linear_attention._triton.blocks import key_and_value, load, softmax_of_columns, store


@triton.jit
def _add_keys(k, v, inside, most, total, context):
    """What is known of some keys, and of these too; weights are relative to the largest key so far."""
    k = tl.where(inside, k, -float("inf"))
    now = tl.maximum(most, tl.max(k, 1))
    finite = tl.where(now == -float("inf"), 0.0, now)
    weights = tl.exp(k - finite[:, None])
    factor = tl.exp(most - finite)
    total = total * factor + tl.sum(weights, 1)
    context = context * factor[:, None] + tl.dot(weights, tl.trans(v), input_precision="ieee")
    return now, total, context


@triton.jit
def linear_attention_keys_kernel(
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
    part_context,
    part_most,
    part_total,
    heads,
    channels,
    positions,
    remembered,
    chunks,
    all_chunks,
    chunk,
    of_memory,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums over a chunk of the keys, or over those of the memory: chunk number `chunks`."""
    program = tl.program_id(0)
    both, number = program // all_chunks, program % all_chunks
    n, h = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    c, p = tl.arange(0, LANES), tl.arange(0, TILE)
    most = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    context = tl.zeros([LANES, LANES], tl.float32)
    if number < chunks:
        for tile in range(chunk):
            first = (number * chunk + tile) * TILE
            inside = (c < channels)[:, None] & (first + p < positions)[None, :]
            k, v = key_and_value(
                qkv, heads, n, h, sample, head, channel, position, memory, memory_part, memory_head, memory_channel,
                memory_position, first, c, p, inside, False,
            )  # fmt: skip
            most, total, context = _add_keys(k, v, inside, most, total, context)
    elif memory is not None:
        for tile in range(of_memory):
            first = tile * TILE
            inside = (c < channels)[:, None] & (first + p < remembered)[None, :]
            k, v = key_and_value(
                qkv, heads, n, h, sample, head, channel, position, memory, memory_part, memory_head, memory_channel,
                memory_position, first, c, p, inside, True,
            )  # fmt: skip
            most, total, context = _add_keys(k, v, inside, most, total, context)
    row = program.to(tl.int64) * channels + c
    tl.store(part_most + row, most, c < channels)
    tl.store(part_total + row, total, c < channels)
    square = (c < channels)[:, None] & (c < channels)[None, :]
    tl.store(part_context + (row * channels)[:, None] + c[None, :], context, square)


@triton.jit
def linear_attention_join_kernel(
    part_context,
    part_most,
    part_total,
    context,
    k_max,
    k_sum,
    channels,
    chunks,
    LANES: tl.constexpr,
):
    """The chunks of a head, in order."""
    both = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LANES)
    rows = c < channels
    square = rows[:, None] & rows[None, :]
    most = tl.full([LANES], -float("inf"), tl.float32)
    for number in range(chunks):
        row = (both * chunks + number) * channels + c
        most = tl.maximum(most, tl.load(part_most + row, rows, other=0.0))
    total = tl.zeros([LANES], tl.float32)
    value = tl.zeros([LANES, LANES], tl.float32)
    for number in range(chunks):
        row = (both * chunks + number) * channels + c
        factor = tl.exp(tl.load(part_most + row, rows, other=0.0) - most)
        total += factor * tl.load(part_total + row, rows, other=1.0)
        part = tl.load(part_context + (row * channels)[:, None] + c[None, :], square, other=0.0)
        value += factor[:, None] * part
    row = both * channels + c
    tl.store(context + (row * channels)[:, None] + c[None, :], value / total[:, None], square)
    tl.store(k_max + row, most, rows)
    tl.store(k_sum + row, total, rows)


@triton.jit
def linear_attention_kernel(
    qkv,
    sample,
    head,
    channel,
    position,
    context,
    out,
    out_sample,
    out_head,
    out_channel,
    out_position,
    scale,
    heads,
    channels,
    positions,
    tiles,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of the result."""
    program = tl.program_id(0)
    both, first = program // tiles, program % tiles * TILE
    n, h = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    c, p = tl.arange(0, LANES), tl.arange(0, TILE)
    rows = c < channels
    inside = rows[:, None] & (first + p < positions)[None, :]
    q = load(qkv + n * sample + h * head, first, c, p, channel, position, inside)
    weights = scale * softmax_of_columns(q, rows[:, None])
    at = (both.to(tl.int64) * channels + c[None, :]) * channels + c[:, None]
    transposed = tl.load(context + at, rows[:, None] & rows[None, :], other=0.0)
    value = tl.dot(transposed, weights, input_precision="ieee")
    store(out + n * out_sample + h * out_head, first, c, p, out_channel, out_position, value, inside)
