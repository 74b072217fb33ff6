"""What the kernels of a solver's step read alike: a row of its table, and the mean under guidance.

solver_step and dynamic_threshold come to the same bits of x0, because every rounding of it is said here outright.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._layout import float32_dense
from diffkern.ops._triton.arithmetic import fma


@triton.jit
def row_of(row, n, num_rows, ROWS: tl.constexpr):
    """(row of sample n, moved into the table; whether it was there). ROWS: whether there is one for every sample."""
    if ROWS:
        row += n
    index = tl.load(row)
    valid = (index >= 0) & (index < num_rows)
    return tl.minimum(tl.maximum(index, 0), num_rows - 1), valid


@triton.jit
def inside_if(inside, condition):
    """`inside` if the one condition holds. By selection: the interpreter cannot spread a comparison of floats."""
    return tl.where(condition, inside, False)


@triton.jit
def guided_mean(
    uncond,
    uncond_stride,
    cond,
    cond_stride,
    scale,
    rescale,
    n,
    base,
    offsets,
    mask,
    GUIDED: tl.constexpr,
    SCALES: tl.constexpr,
    RESCALED: tl.constexpr,
):
    """m = r·(u + w·(c − u)) of sample n in float32; u alone without guidance. What is not in the mask is not read.

    scale, rescale: addresses of w and r in float64. SCALES: whether there is a w for every sample.
    """
    m = tl.load(uncond + n * uncond_stride + base + offsets, mask, 0.0).to(tl.float32)
    if GUIDED:
        if SCALES:
            scale += n
        c = tl.load(cond + n * cond_stride + base + offsets, mask, 0.0).to(tl.float32)
        m = fma(c - m, tl.load(scale).to(tl.float32), m)
    if RESCALED:
        m = m * tl.load(rescale + n).to(tl.float32)
    return m


@triton.jit
def predicted_x0(a_x, x, a_m, m):
    """a_x·x + a_m·m; an operand whose coefficient is 0 is not looked at."""
    x0 = tl.where(a_x != 0, a_x * x, 0.0)
    return tl.where(a_m != 0, fma(m, a_m, x0), x0)


def mean_arguments(
    mean: Tensor, guidance_scale: Tensor | None, rescale: Tensor | None, channels_last: bool
) -> dict[str, Any]:
    """Those of guided_mean, of a network's output without the channels of a variance."""
    samples = mean.shape[0] if guidance_scale is None else mean.shape[0] // 2
    uncond = float32_dense(mean[:samples], channels_last)
    cond = None if guidance_scale is None else float32_dense(mean[samples:], channels_last)
    assert uncond is not None
    return {
        "uncond": uncond,
        "uncond_stride": uncond.stride(0),
        "cond": cond,
        "cond_stride": 0 if cond is None else cond.stride(0),
        "guidance_scale": None if guidance_scale is None else guidance_scale.contiguous(),
        "guidance_rescale": None if rescale is None else rescale.contiguous(),
        "GUIDED": cond is not None,
        "SCALES": guidance_scale is not None and guidance_scale.dim() > 0,
        "RESCALED": rescale is not None,
    }
