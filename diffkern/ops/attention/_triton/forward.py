"""The kernel of attention's forward pass. What the arguments are stands in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import fma, product
from diffkern.ops.attention._triton.tiles import added, inner, load, of_head, scaled, store, zeros

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attention_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    out,
    out_strides,
    largest_of,
    rest_of,
    heads,
    queries,
    keys,
    blocks,
    scale,
    scale_log2,
    PIECES: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    PADDED: tl.constexpr,
    NEGATED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program has ROWS queries of a head, and takes its keys KEYS at a time; WHOLE: all of them at once.

    scale_log2 is scale·log2(e), so that weights are powers of two; neither is negative, with NEGATED the products are
    taken so. Rows' largest products, their sums of weights and the weighted values are put right whenever a larger
    product comes (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    pair, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    of_q = of_head(q, q_strides, pair, heads, first, ALIGNED)
    of_k = of_head(k, k_strides, pair, heads, 0, ALIGNED)
    of_v = of_head(v, v_strides, pair, heads, 0, ALIGNED)
    q_tile = load(of_q, q_strides, row, queries - first, PIECES, HEAD)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = zeros(ROWS, PIECES)
    if WHOLE:
        total, largest, values = _step(
            total, largest, values, q_tile, of_k, k_strides, of_v, v_strides, key, keys, scale_log2,
            PIECES, HEAD, PADDED, NEGATED, PRECISION, SPLIT,
        )  # fmt: skip
    else:
        for at in tl.range(0, keys, KEYS, num_stages=STAGES):
            start = tl.cast(at, tl.int64)
            total, largest, values = _step(
                total, largest, values, q_tile, of_k + start * k_strides[2], k_strides, of_v + start * v_strides[2],
                v_strides, key, keys - at, scale_log2, PIECES, HEAD, PADDED, NEGATED, PRECISION, SPLIT,
            )  # fmt: skip
    of_out = of_head(out, out_strides, pair, heads, first, ALIGNED)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store(of_out, out_strides, values, inverse[:, None], row, queries - first, PIECES, HEAD)
    if largest_of is not None:
        at = pair.to(tl.int64) * queries + first + row
        # The log-sum-exp in two parts: of the largest score what rounding takes goes with the rest.
        finite = _finite(largest)
        rounded = product(finite, scale)
        rest = tl.log2(total) * LN_2 + fma(finite, scale, -rounded)
        tl.store(largest_of + at, tl.where(largest == float("-inf"), largest, rounded), row < queries - first)
        tl.store(rest_of + at, tl.where(total == 0.0, 0.0, rest), row < queries - first)


@triton.jit
def _step(
    total,
    largest,
    values,
    q_tile,
    of_k,
    k_strides,
    of_v,
    v_strides,
    key,
    keys,
    scale,
    PIECES: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    NEGATED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(total, largest, values) with a block of keys, of which `keys` are left."""
    k_tile = load(of_k, k_strides, key, keys, PIECES, HEAD)
    v_tile = load(of_v, v_strides, key, keys, PIECES, HEAD)
    products = inner(q_tile, k_tile, PRECISION)
    if NEGATED:
        products = -products
    if PADDED:
        products = tl.where((key < keys)[None, :], products, float("-inf"))
    now = tl.maximum(largest, tl.max(products, 1))
    # The largest score is the sum of two numbers, of which the second is what rounding took from the first: far from 0
    # that is no small part of an exponent.
    finite = _finite(now)
    shift = product(finite, scale)
    rest = fma(finite, scale, -shift)
    exponents = fma(products, scale, -shift[:, None]) - rest[:, None]
    if PADDED:
        exponents = tl.where((key < keys)[None, :], exponents, float("-inf"))
    weights = tl.exp2(exponents)
    shrunk = tl.where(largest == float("-inf"), 0.0, tl.exp2(fma(largest, scale, -shift) - rest))
    total = total * shrunk + tl.sum(weights, 1)
    return total, now, added(scaled(values, shrunk), weights, v_tile, PRECISION, SPLIT)


@triton.jit
def _finite(largest):
    """What to subtract: 0 for −inf, so that weights are 0 and not NaN where all scores are −inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)
