"""The kernels of attention's backward pass (docs/attention.md). What the arguments are stands in ../triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import fma
from diffkern.ops.attention._triton.tiles import added, inner, load, of_head, store, zeros

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_query_gradients_kernel(
    dout,
    dout_strides,
    out,
    out_strides,
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    dq,
    dq_strides,
    largest_of,
    rest_of,
    deltas,
    heads,
    queries,
    keys,
    blocks,
    scale,
    PIECES: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program has ROWS queries of a head; their Σ dout·out go to deltas (B, heads, T), for the kernel of the keys."""
    pair, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    left = queries - first
    q_tile = load(of_head(q, q_strides, pair, heads, first, ALIGNED), q_strides, row, left, PIECES, HEAD)
    dout_tile = load(of_head(dout, dout_strides, pair, heads, first, ALIGNED), dout_strides, row, left, PIECES, HEAD)
    out_tile = load(of_head(out, out_strides, pair, heads, first, ALIGNED), out_strides, row, left, PIECES, HEAD)
    delta = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(dout_tile[i].to(tl.float32) * out_tile[i].to(tl.float32), 1)
    of_rows = pair.to(tl.int64) * queries + first
    tl.store(deltas + of_rows + row, delta, row < left)
    largest, rest = _log_sum_exp(largest_of + of_rows, rest_of + of_rows, row, left)
    of_k = of_head(k, k_strides, pair, heads, 0, ALIGNED)
    of_v = of_head(v, v_strides, pair, heads, 0, ALIGNED)
    sums = zeros(ROWS, PIECES)
    for at in tl.range(0, keys, KEYS, num_stages=STAGES):
        start = tl.cast(at, tl.int64)
        k_tile = load(of_k + start * k_strides[2], k_strides, key, keys - at, PIECES, HEAD)
        v_tile = load(of_v + start * v_strides[2], v_strides, key, keys - at, PIECES, HEAD)
        weights = _weights(inner(q_tile, k_tile, PRECISION), scale, largest[:, None], rest[:, None])
        dscores = weights * (inner(dout_tile, v_tile, PRECISION) - delta[:, None])
        if PADDED:
            dscores = tl.where((key < keys - at)[None, :], dscores, 0.0)
        sums = added(sums, dscores, k_tile, PRECISION, SPLIT)
    store(of_head(dq, dq_strides, pair, heads, first, ALIGNED), dq_strides, sums, scale, row, left, PIECES, HEAD)


@triton.jit
def attention_key_gradients_kernel(
    dout,
    dout_strides,
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    dk,
    dk_strides,
    dv,
    dv_strides,
    largest_of,
    rest_of,
    deltas,
    heads,
    queries,
    keys,
    blocks,
    scale,
    PIECES: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program has KEYS keys of a head, and takes its queries ROWS at a time. Scores are keys × queries."""
    pair, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * KEYS
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    left = keys - first
    k_tile = load(of_head(k, k_strides, pair, heads, first, ALIGNED), k_strides, key, left, PIECES, HEAD)
    v_tile = load(of_head(v, v_strides, pair, heads, first, ALIGNED), v_strides, key, left, PIECES, HEAD)
    of_q = of_head(q, q_strides, pair, heads, 0, ALIGNED)
    of_dout = of_head(dout, dout_strides, pair, heads, 0, ALIGNED)
    of_rows = pair.to(tl.int64) * queries
    dk_sums, dv_sums = zeros(KEYS, PIECES), zeros(KEYS, PIECES)
    for at in tl.range(0, queries, ROWS, num_stages=STAGES):
        start = tl.cast(at, tl.int64)
        q_tile = load(of_q + start * q_strides[2], q_strides, row, queries - at, PIECES, HEAD)
        dout_tile = load(of_dout + start * dout_strides[2], dout_strides, row, queries - at, PIECES, HEAD)
        largest, rest = _log_sum_exp(largest_of + of_rows + at, rest_of + of_rows + at, row, queries - at)
        delta = tl.load(deltas + of_rows + at + row, row < queries - at, other=0.0)
        weights = _weights(inner(k_tile, q_tile, PRECISION), scale, largest[None, :], rest[None, :])
        dscores = weights * (inner(v_tile, dout_tile, PRECISION) - delta[None, :])
        if PADDED:
            weights = tl.where((row < queries - at)[None, :], weights, 0.0)
            dscores = tl.where((row < queries - at)[None, :], dscores, 0.0)
        dv_sums = added(dv_sums, weights, dout_tile, PRECISION, SPLIT)
        dk_sums = added(dk_sums, dscores, q_tile, PRECISION, SPLIT)
    store(of_head(dk, dk_strides, pair, heads, first, ALIGNED), dk_strides, dk_sums, scale, key, left, PIECES, HEAD)
    store(of_head(dv, dv_strides, pair, heads, first, ALIGNED), dv_strides, dv_sums, 1.0, key, left, PIECES, HEAD)


@triton.jit
def _log_sum_exp(largest_of, rest_of, row, rows):
    """The rows' log-sum-exp in its two parts; 0 where all scores are −inf, so that weights are 0 and not NaN."""
    largest = tl.load(largest_of + row, row < rows, other=0.0)
    return tl.where(largest == float("-inf"), 0.0, largest), tl.load(rest_of + row, row < rows, other=0.0)


@triton.jit
def _weights(products, scale, largest, rest):
    """The largest score is subtracted first: what is left of a score and of the log-sum-exp is small if it matters."""
    return tl.exp2((fma(products, scale, -largest) - rest) * LOG2_E)
