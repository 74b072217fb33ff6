"""The kernel of attention's forward pass. What the arguments are stands in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

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
    lse,
    heads,
    queries,
    keys,
    blocks,
    scale,
    PIECES: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    PADDED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program has ROWS queries of a head, and takes its keys KEYS at a time; WHOLE: all of them at once.

    scale is in units of log2(e), so that weights are powers of two. Rows' largest scores, their sums of weights and the
    weighted values are put right whenever a larger score comes (Milakov and Gimelshein 2018, arXiv 1805.02867).
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
            total, largest, values, q_tile, of_k, k_strides, of_v, v_strides, key, keys, scale,
            PIECES, HEAD, PADDED, PRECISION, SPLIT,
        )  # fmt: skip
    else:
        for at in tl.range(0, keys, KEYS, num_stages=STAGES):
            start = tl.cast(at, tl.int64)
            total, largest, values = _step(
                total, largest, values, q_tile, of_k + start * k_strides[2], k_strides, of_v + start * v_strides[2],
                v_strides, key, keys - at, scale, PIECES, HEAD, PADDED, PRECISION, SPLIT,
            )  # fmt: skip
    of_out = of_head(out, out_strides, pair, heads, first, ALIGNED)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store(of_out, out_strides, values, inverse[:, None], row, queries - first, PIECES, HEAD)
    if lse is not None:
        of_lse = lse + pair.to(tl.int64) * queries + first
        tl.store(of_lse + row, (largest + tl.log2(total)) * LN_2, row < queries - first)


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
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(total, largest, values) with a block of keys, of which `keys` are left."""
    k_tile = load(of_k, k_strides, key, keys, PIECES, HEAD)
    v_tile = load(of_v, v_strides, key, keys, PIECES, HEAD)
    scores = inner(q_tile, k_tile, PRECISION) * scale
    if PADDED:
        scores = tl.where((key < keys)[None, :], scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - base[:, None])
    shrunk = tl.exp2(largest - base)
    total = total * shrunk + tl.sum(weights, 1)
    return total, now, added(scaled(values, shrunk), weights, v_tile, PRECISION, SPLIT)
