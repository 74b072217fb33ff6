"""dynamic_threshold on a GPU: a program a sample, which finds two order statistics by the bits of |x0|.

The bits of non-negative floats, read as integers, are in the order of the numbers, with NaN last. Four passes over x
and m, each for a histogram of the next eight bits of those values whose higher bits are known to be the quantile's; a
fifth only where the next value above has other bits. A pass reads 8 bytes an element in float32 (12 under guidance),
and computes x0 again, by the code of the step itself. Bound by the instructions: some 90 an element and histogram.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._indices import check_values
from diffkern.ops._layout import float32_dense, sample_shape
from diffkern.ops._terms import FIXED
from diffkern.ops._triton import launch
from diffkern.ops._triton.step import guided_mean, inside_if, mean_arguments, predicted_x0, row_of
from diffkern.ops.dynamic_threshold.launch_choices import choose

_A_X, _A_M = tl.constexpr(FIXED.index("a_x")), tl.constexpr(FIXED.index("a_m"))
_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _magnitudes(
    x, uncond, uncond_stride, cond, cond_stride, scale, rescale, n, start, offsets, inside, a_x, a_m,
    GUIDED: tl.constexpr, SCALES: tl.constexpr, RESCALED: tl.constexpr,
):  # fmt: skip
    """The bits of |x0|, int32 (BLOCK,)."""
    state = tl.load(x + start + offsets, inside_if(inside, a_x != 0), 0.0).to(tl.float32)
    m = guided_mean(
        uncond, uncond_stride, cond, cond_stride, scale, rescale, n, start, offsets, inside_if(inside, a_m != 0),
        GUIDED, SCALES, RESCALED,
    )  # fmt: skip
    return predicted_x0(a_x, state, a_m, m).to(tl.int32, bitcast=True) & _LAST


@triton.jit
def dynamic_threshold_kernel(
    x,
    x_stride,
    uncond,
    uncond_stride,
    cond,
    cond_stride,
    guidance_scale,
    guidance_rescale,
    table,
    num_rows,
    num_columns,
    row,
    out,
    size,
    rank,
    weight: tl.float64,
    largest: tl.float64,
    ROWS: tl.constexpr,
    GUIDED: tl.constexpr,
    SCALES: tl.constexpr,
    RESCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    index, valid = row_of(row, n, num_rows, ROWS)
    a_x = tl.where(valid, tl.load(table + index * num_columns + _A_X).to(tl.float32), float("nan"))
    a_m = tl.load(table + index * num_columns + _A_M).to(tl.float32)
    x += n * x_stride
    offsets = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)

    # `found` are the highest bits of value number `rank`; `among` is its number among those that share them.
    found = tl.full((), 0, tl.int32)
    among = rank
    equal = size
    for step in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)
        start = tl.full((), 0, tl.int64)
        while start < size:
            inside = offsets < size - start
            bits = _magnitudes(
                x, uncond, uncond_stride, cond, cond_stride, guidance_scale, guidance_rescale, n, start, offsets,
                inside, a_x, a_m, GUIDED, SCALES, RESCALED,
            )  # fmt: skip
            if step > 0:
                inside = inside & ((bits >> (32 - 8 * step)) == found)
            counts += tl.histogram((bits >> (24 - 8 * step)) & 255, 256, inside)
            start += BLOCK
        below = tl.cumsum(counts, 0) <= among
        digit = tl.sum(below.to(tl.int32), 0)
        among -= tl.sum(tl.where(below, counts, 0), 0)
        equal = tl.sum(tl.where(digits == digit, counts, 0), 0)
        found = found * 256 + digit

    above = found
    if (among + 1 == equal) & (rank + 1 < size):
        least = tl.full([BLOCK], _LAST, tl.int32)
        start = tl.full((), 0, tl.int64)
        while start < size:
            inside = offsets < size - start
            bits = _magnitudes(
                x, uncond, uncond_stride, cond, cond_stride, guidance_scale, guidance_rescale, n, start, offsets,
                inside, a_x, a_m, GUIDED, SCALES, RESCALED,
            )  # fmt: skip
            least = tl.where(inside & (bits > found), tl.minimum(least, bits), least)
            start += BLOCK
        above = tl.min(least, 0)

    # The op's result is float64, a handful of operations a sample; written so that a NaN passes the comparisons.
    lower = found.to(tl.float32, bitcast=True).to(tl.float64)
    upper = above.to(tl.float32, bitcast=True).to(tl.float64)
    if weight < 0.5:
        s = lower + weight * (upper - lower)
    else:
        s = upper - (1.0 - weight) * (upper - lower)
    s = tl.where(s < 1.0, 1.0, s)
    tl.store(out + n, tl.where(s > largest, largest, s))


def dynamic_threshold(
    x: Tensor,
    mean: Tensor,
    table: Tensor,
    row: Tensor,
    guidance_scale: Tensor | None,
    rescale: Tensor | None,
    ratio: float,
    largest: float,
) -> Tensor:
    check_values("row", row, table.shape[0])
    samples, channels, pixels, channels_last = sample_shape(x)
    size = channels * pixels
    if size == 0:
        return x.new_ones(samples, dtype=torch.float64)
    threshold = x.new_empty(samples, dtype=torch.float64)
    state = float32_dense(x, channels_last)
    assert state is not None
    position = ratio * (size - 1)
    chosen = choose(size)
    launch.launch(
        dynamic_threshold_kernel,
        samples,
        x.device,
        num_warps=chosen.num_warps,
        x=state,
        x_stride=state.stride(0),
        **mean_arguments(mean, guidance_scale, rescale, channels_last),
        table=table,
        num_rows=table.shape[0],
        num_columns=table.shape[1],
        row=row.contiguous(),
        out=threshold,
        size=size,
        rank=int(position),
        weight=position - int(position),
        largest=largest,
        ROWS=row.dim() > 0,
        BLOCK=chosen.elements,
    )
    return threshold


def dynamic_threshold_unsupported(x: Tensor, *rest: object) -> str | None:
    return launch.unsupported(x)
