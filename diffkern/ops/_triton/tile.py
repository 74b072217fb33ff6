"""Which elements of a sample a program has, where they lie in memory, and the normals that belong to them.

A tile is one-dimensional, whatever the memory format. Its order is one of

- LINEAR: consecutive elements, in memory and (if noise is made) in the logical order too: contiguous tensors;
- PIXELS: four consecutive pixels of each of a few channels, for channels last. A counter's four normals go to them;
- SINGLE: consecutive elements in memory, each with a counter of its own (four times the work): channels last where the
  number of pixels is no multiple of four;
- TORCH: as torch draws on a GPU (`torch_draws` of elementwise.py). Its threads take four normals a call, for elements
  that lie as far apart as there are threads; a tile has the elements of some threads' one call, whatever their samples.

Offsets within a tile are 32 bits; what passes 2³¹ is in the tile's base.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton import philox
from diffkern.ops._triton.normal import pair, torch_pair

LINEAR = tl.constexpr(0)
PIXELS = tl.constexpr(1)
SINGLE = tl.constexpr(2)
TORCH = tl.constexpr(3)


@triton.jit
def place(program, blocks, size, channels, pixels, BLOCK: tl.constexpr, ORDER: tl.constexpr, WIDTH: tl.constexpr):
    """(n, base, offsets, inside, counter, lane) of program number `program`, of which a sample has `blocks`.

    n: int64, the sample. The others are those of place_in_sample.

    In the order TORCH `channels` is the number of torch's threads, `pixels` that of all elements, `blocks` the tiles of
    a call of all threads; n is a vector, counter the number of a thread and lane that of its call.
    """
    if ORDER == TORCH:
        call = (program // blocks).to(tl.int64)
        thread = (program % blocks) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        element = call * 4 * channels + thread
        elements = tl.reshape(element[:, None] + (tl.arange(0, 4) * channels)[None, :], [BLOCK])
        drawn = tl.reshape(tl.broadcast_to((thread < channels)[:, None], [BLOCK // 4, 4]), [BLOCK])
        inside = drawn & (elements < pixels)
        n = tl.where(inside, elements // size, 0)  # what is outside is of no sample
        return n, call * 0, elements - n * size, inside, thread.to(tl.uint32), call
    n = (program // blocks).to(tl.int64)
    base, offsets, inside, counter, lane = place_in_sample(
        program % blocks, size, channels, pixels, BLOCK, ORDER, WIDTH
    )
    return n, base, offsets, inside, counter, lane


@triton.jit
def place_in_sample(block, size, channels, pixels, BLOCK: tl.constexpr, ORDER: tl.constexpr, WIDTH: tl.constexpr):
    """(base, offsets, inside, counter, lane) of tile number `block` of a sample, in an order other than TORCH.

    base: int64, what to add to the sample's address. offsets, inside: (BLOCK,), from there and whether they
    belong to it. counter: uint32 (BLOCK/4,), or (BLOCK,) in the order SINGLE, where lane says which of its normals.
    WIDTH: channels of a tile in the order PIXELS, a power of two.
    """
    block = tl.cast(block, tl.int64)
    if ORDER == PIXELS:
        quads: tl.constexpr = BLOCK // 4 // WIDTH
        channel_blocks = (channels + WIDTH - 1) // WIDTH
        local = tl.arange(0, BLOCK // 4)
        c = (block % channel_blocks).to(tl.int32) * WIDTH + local % WIDTH
        first = (block // channel_blocks) * quads
        quad = local // WIDTH
        base = first * 4 * channels
        corners = quad * 4 * channels + c
        offsets = tl.reshape(corners[:, None] + (tl.arange(0, 4) * channels)[None, :], [BLOCK])
        within = (c < channels) & (quad < pixels // 4 - first)
        inside = tl.reshape(tl.broadcast_to(within[:, None], [BLOCK // 4, 4]), [BLOCK])
        counter = c.to(tl.uint32) * (pixels // 4).to(tl.uint32) + first.to(tl.uint32) + quad.to(tl.uint32)
        lane = local
    else:
        base = block * BLOCK
        offsets = tl.arange(0, BLOCK)
        inside = offsets < size - base
        if ORDER == SINGLE:
            position = (base % channels).to(tl.int32) + offsets
            p = base // channels + position // channels
            index = (position % channels).to(tl.int64) * pixels + p
            counter = (index >> 2).to(tl.uint32)
            lane = (index & 3).to(tl.int32)
        else:
            lane = tl.arange(0, BLOCK // 4)
            counter = (base // 4).to(tl.uint32) + lane.to(tl.uint32)
    return base, offsets, inside, counter, lane


@triton.jit
def words(counter, n, seed, draw, samples, stream, DRAWS: tl.constexpr, SAMPLES: tl.constexpr):
    """The four words of each counter of sample n. seed, draw, samples: addresses of int64 numbers.

    DRAWS, SAMPLES: whether there is one for every sample, or one draw for all and the first sample's number.
    """
    k0, k1 = philox.key(tl.load(seed))
    if DRAWS:
        draw += n
    if SAMPLES:
        sample = tl.load(samples + n)
    else:
        sample = tl.load(samples) + n
    c1, c2, c3 = philox.tail(tl.load(draw), sample, stream)
    return philox.words(counter, c1, c2, c3, k0, k1)


@triton.jit
def normals(
    counter,
    lane,
    n,
    seed,
    draw,
    samples,
    stream,
    DRAWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    FAST: tl.constexpr,
):
    """float32 (BLOCK,): the normals of a tile's elements, as `place` gave counter and lane.

    In the order TORCH seed and draw are the numbers themselves: the generator's seed and a quarter of its offset.
    """
    if ORDER == TORCH:
        k0, k1 = philox.key(seed.to(tl.int64))
        call = draw.to(tl.int64) + lane
        g0, g1, g2, g3 = philox.words(
            call.to(tl.uint32), (call >> 32).to(tl.uint32), counter, (call * 0).to(tl.uint32), k0, k1
        )
        a, b = torch_pair(g0, g1)
        c, d = torch_pair(g2, g3)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    g0, g1, g2, g3 = words(counter, n, seed, draw, samples, stream, DRAWS, SAMPLES)
    if ORDER == SINGLE:
        second = lane >= 2
        a, b = pair(tl.where(second, g2, g0), tl.where(second, g3, g1), FAST)
        z = tl.where((lane & 1) != 0, b, a)
    else:
        a, b = pair(g0, g1, FAST)
        c, d = pair(g2, g3, FAST)
        z = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    return z


@triton.jit
def table_value(table, index, length):
    """table[index] as float32 (the only arithmetic on float64: its rounding), NaN where the index is out of range."""
    valid = (index >= 0) & (index < length)
    value = tl.load(table + tl.minimum(tl.maximum(index, 0), length - 1)).to(tl.float32)
    return tl.where(valid, value, float("nan"))
