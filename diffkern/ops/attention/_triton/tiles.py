"""What attention's kernels share: tiles of some positions of a head, and products of them.

A tile (positions × head channels) is a tuple of PIECES: (first channel, width), the width a power of two, of which the
last may reach beyond the head's channels HEAD. So 40 channels cost 48 and not 64, and 512 are four pieces of 128.
Offsets within a tile are 32 bits; what passes 2³¹ is in its base.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import ON_DEVICE


@triton.jit
def of_head(x, strides, pair, heads, first, ALIGNED: tl.constexpr):
    """Where position `first` of sample and head number `pair` begins; batch and head strides are ALIGNED multiples."""
    pair = pair.to(tl.int64)
    offset = pair // heads * strides[0] + pair % heads * strides[1]
    return x + tl.multiple_of(offset, ALIGNED) + tl.cast(first, tl.int64) * strides[2]


@triton.jit
def load(base, strides, row, rows, PIECES: tl.constexpr, HEAD: tl.constexpr):
    """The tile of the positions `row` behind the base, as stored; 0 outside."""
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        at, inside = _places(base, strides, row, rows, PIECES[i][0], PIECES[i][1], HEAD)
        pieces += (tl.load(at, inside, other=0.0),)  # type: ignore[assignment]
    return pieces


@triton.jit
def store(base, strides, pieces, factor, row, rows, PIECES: tl.constexpr, HEAD: tl.constexpr):
    """The pieces times the positions' (R, 1) or a common factor."""
    for i in tl.static_range(len(PIECES)):
        at, inside = _places(base, strides, row, rows, PIECES[i][0], PIECES[i][1], HEAD)
        tl.store(at, pieces[i] * factor, inside)


@triton.jit
def _places(base, strides, row, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (c < HEAD)[None, :]
    return base + ((row * strides[2])[:, None] + (c * strides[3])[None, :]), inside


@triton.jit
def zeros(ROWS: tl.constexpr, PIECES: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        pieces += (_zeros(ROWS, PIECES[i][1]),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def scaled(pieces, factor):
    """The pieces times the positions' factor (R,)."""
    products = ()
    for i in tl.static_range(len(pieces)):
        products += (pieces[i] * factor[:, None],)  # type: ignore[assignment]
    return products


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """(R, K): the products of the positions of two tiles, summed over the channels in float32."""
    total = _dot(a[0], tl.trans(b[0]), None, PRECISION)
    for i in tl.static_range(1, len(a)):
        total = _dot(a[i], tl.trans(b[i]), total, PRECISION)
    return total


@triton.jit
def added(pieces, weights, x, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """pieces + weights · x for float32 weights (R, K) and a tile x of K positions.

    16-bit x is multiplied by 16-bit weights; with SPLIT by two of them, whose sum is right to float32's rounding or,
    for bfloat16, to 2⁻¹⁷.
    """
    high = weights.to(x[0].dtype)
    sums = ()
    for i in tl.static_range(len(pieces)):
        total = pieces[i]
        if SPLIT:
            rest = _dot((weights - high.to(tl.float32)).to(x[0].dtype), x[i], None, PRECISION)
            # Of what is infinite the first product says it all, and nothing of it would be NaN.
            total += tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
        sums += (_dot(high, x[i], total, PRECISION),)  # type: ignore[assignment]
    return sums


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """a·b + total in float32; PRECISION is of float32 operands. The interpreter would multiply in their dtype."""
    if ON_DEVICE:
        return tl.dot(a, b, total, input_precision=PRECISION)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
