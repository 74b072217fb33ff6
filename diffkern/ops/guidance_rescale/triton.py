"""guidance_rescale on a GPU: a program a sample, which goes over u and c once.

8 bytes an element in float32. What the op promises is float64 (a deviation beside any mean, and 0 of equal values), so
this is one of the few kernels that compute in it: fourteen instructions an element, which the large GPUs issue at half
the rate of float32, and others at a 64th. Each place of a tile keeps the mean and the squared deviations of its own
values (Welford 1962); the places are joined at the end, around the mean of their means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._layout import is_channels_last, sample_dense, sample_shape
from diffkern.ops._triton import launch
from diffkern.ops.guidance_rescale.launch_choices import choose


@triton.jit
def _squares(mean, squares, counts, size):
    """The sum of squared deviations of all values, from the places' means and sums and how many values each has."""
    between = mean - tl.sum(mean * counts, 0) / size
    return tl.sum(squares + counts * between * between, 0)


@triton.jit
def guidance_rescale_kernel(
    uncond,
    cond,
    stride,
    scale,
    phi: tl.float64,
    out,
    size,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    uncond += n * stride
    cond += n * stride
    if SCALES:
        scale += n
    w = tl.load(scale)
    first_u, first_c = tl.load(uncond).to(tl.float64), tl.load(cond).to(tl.float64)
    first_m = tl.fma(w, first_c - first_u, first_u)
    offsets = tl.arange(0, BLOCK)
    mean_c = tl.zeros([BLOCK], tl.float64)
    mean_m = tl.zeros([BLOCK], tl.float64)
    squares_c = tl.zeros([BLOCK], tl.float64)
    squares_m = tl.zeros([BLOCK], tl.float64)
    start = tl.full((), 0, tl.int64)
    while start < size:
        inside = offsets < size - start
        u = tl.load(uncond + start + offsets, inside, 0.0).to(tl.float32).to(tl.float64)
        c = tl.load(cond + start + offsets, inside, 0.0).to(tl.float32).to(tl.float64)
        share = 1.0 / tl.full((), start // BLOCK + 1, tl.float64)
        # Differences from the sample's first values: exactly 0 where all are equal.
        of_c = tl.where(inside, (c - first_c) - mean_c, 0.0)
        of_m = tl.where(inside, (tl.fma(w, c - u, u) - first_m) - mean_m, 0.0)
        mean_c += of_c * share
        mean_m += of_m * share
        squares_c += of_c * of_c * (1.0 - share)
        squares_m += of_m * of_m * (1.0 - share)
        start += BLOCK
    counts = ((size - offsets + (BLOCK - 1)) // BLOCK).to(tl.float64)
    whole = tl.full((), size, tl.float64)
    # The count that both variances are divided by is the same.
    ratio = tl.sqrt(_squares(mean_c, squares_c, counts, whole) / _squares(mean_m, squares_m, counts, whole))
    tl.store(out + n, phi * ratio + (1.0 - phi))


def guidance_rescale(model_output: Tensor, guidance_scale: Tensor, phi: float) -> Tensor:
    samples, channels, pixels, _ = sample_shape(model_output)
    samples, size = samples // 2, channels * pixels
    if size < 2:
        return model_output.new_ones(samples, dtype=torch.float64)
    # The order of the values does not matter, so long as it is that of both halves.
    model_output = sample_dense(model_output, is_channels_last(model_output))
    rescale = model_output.new_empty(samples, dtype=torch.float64)
    chosen = choose(size)
    launch.launch(
        guidance_rescale_kernel,
        samples,
        model_output.device,
        num_warps=chosen.num_warps,
        uncond=model_output[:samples],
        cond=model_output[samples:],
        stride=model_output.stride(0),
        scale=guidance_scale.contiguous(),
        phi=phi,
        out=rescale,
        size=size,
        SCALES=guidance_scale.dim() > 0,
        BLOCK=chosen.elements,
    )
    return rescale


def guidance_rescale_unsupported(model_output: Tensor, *rest: object) -> str | None:
    return launch.unsupported(model_output)
