"""diffusion_loss on a GPU, and the pass that gives its gradient too.

Reads the network's output, and of x0 and given noise what the target is made of; writes the gradient, if it is asked
for, and one number a sample. With generated noise and the gradient of an ε network that is 8 bytes an element in
float32 and 4 in 16 bits, as in q_sample, and the limits are the same: the noise has most of the instructions, float32
is bound by memory and 16 bits by the instructions. The sums are those of _triton/reduce.py; the target is never stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._indices import check_values
from diffkern.ops._layout import empty_like_layout, float32_dense, sample_dense, sample_shape
from diffkern.ops._triton import launch
from diffkern.ops._triton.arithmetic import fma
from diffkern.ops._triton.elementwise import counter_arguments
from diffkern.ops._triton.reduce import is_last, joined, reduction, share, total
from diffkern.ops._triton.tile import normals, place_in_sample, table_value


@triton.jit
def diffusion_loss_kernel(
    model_output,
    model_output_stride,
    x0,
    x0_stride,
    given,
    given_stride,
    grad,
    loss,
    t,
    signals,
    sigmas,
    num_timesteps,
    weights,
    scales,
    seed,
    draw,
    samples,
    stream,
    blocks,
    size,
    channels,
    pixels,
    sums,
    counters,
    segments,
    parts,
    per_program,
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALES: tl.constexpr,
    GIVEN: tl.constexpr,
    FAST: tl.constexpr,
    DRAWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    STEPS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    n, first, end = share(tl.program_id(0), parts, segments, per_program)
    index = tl.load(t + n)
    # 1, or NaN for an index out of range.
    weight = tl.where((index >= 0) & (index < num_timesteps), 1.0, float("nan")).to(tl.float64)
    if WEIGHTED:
        weight *= tl.load(weights + n)
    if GRADIENT:
        scale = tl.load(scales + n) if SCALES else tl.load(scales)
        slope = (scale * weight).to(tl.float32) * (2.0 / size)
    if TARGET == "v":
        signal = table_value(signals, index, num_timesteps)
        sigma = table_value(sigmas, index, num_timesteps)
    for segment in range(first, end):
        squares = tl.zeros([BLOCK], tl.float32)
        for tile in range(segment * TILES, tl.minimum((segment + 1) * TILES, blocks)):
            base, offsets, inside, counter, lane = place_in_sample(tile, size, channels, pixels, BLOCK, ORDER, WIDTH)
            if TARGET != "eps":
                target = tl.load(x0 + n * x0_stride + base + offsets, inside).to(tl.float32)
            if TARGET != "x0":
                if GIVEN:
                    z = tl.load(given + n * given_stride + base + offsets, inside).to(tl.float32)
                else:
                    z = normals(counter, lane, n, seed, draw, samples, stream, DRAWS, SAMPLES, BLOCK, ORDER, FAST)
                if TARGET == "v":
                    # Which product is fused is said, so that the loss has the same bits with and without the gradient.
                    target = fma(z, signal, -(sigma * target))
                else:
                    target = z
            residual = tl.load(model_output + n * model_output_stride + base + offsets, inside).to(tl.float32) - target
            if GRADIENT:
                tl.store(grad + n * size + base + offsets, slope * residual, inside)
            residual = tl.where(inside, residual, 0.0)
            squares = fma(residual, residual, squares)
        tl.store(sums + n * segments + segment, total(squares, BLOCK, STEPS))
    if is_last(counters, n, parts, SPLIT):
        # In float64, as the weight may be and the sum is: one number a sample.
        tl.store(loss + n, weight * (joined(sums + n * segments, segments) / size))


def diffusion_loss(*arguments: Any) -> Tensor:
    return _run(None, *arguments)


def diffusion_loss_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    grad = empty_like_layout(arguments[0])
    return _run(grad, *arguments), grad


def _run(
    grad: Tensor | None,
    model_output: Tensor,
    x0: Tensor | None,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    weight: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    draw: Tensor | None,
    samples: Tensor | None,
    stream: int,
    target: str,
    scale: Tensor | None = None,
) -> Tensor:
    """The loss; its gradient goes into `grad`, if that is given, times `scale`."""
    check_values("t", t, sqrt_alphas_cumprod.shape[0])
    shape = sample_shape(model_output)
    channels_last = shape[3]
    work = reduction(shape, model_output.device, generates=target != "x0" and noise is None)
    output = sample_dense(model_output, channels_last)
    x0, noise = float32_dense(x0, channels_last), float32_dense(noise, channels_last)
    loss = model_output.new_empty(model_output.shape[0], dtype=torch.float32)
    launch.launch(
        diffusion_loss_kernel,
        work.programs,
        model_output.device,
        num_warps=work.num_warps,
        model_output=output,
        model_output_stride=output.stride(0),
        x0=x0,
        x0_stride=0 if x0 is None else x0.stride(0),
        given=noise,
        given_stride=0 if noise is None else noise.stride(0),
        grad=grad,
        loss=loss,
        t=t.contiguous(),
        signals=sqrt_alphas_cumprod.contiguous(),
        sigmas=sqrt_one_minus_alphas_cumprod.contiguous(),
        num_timesteps=sqrt_alphas_cumprod.shape[0],
        weights=None if weight is None else weight.contiguous(),
        scales=None if scale is None else scale.contiguous(),
        **counter_arguments(seed, draw, samples, stream),
        **work.arguments,
        TARGET=target,
        WEIGHTED=weight is not None,
        GRADIENT=grad is not None,
        SCALES=scale is not None and scale.dim() > 0,
        GIVEN=noise is not None,
        FAST=model_output.dtype != torch.float32,
    )
    return loss


def diffusion_loss_unsupported(model_output: Tensor, *rest: object) -> str | None:
    return launch.unsupported(model_output)


diffusion_loss_and_grad_unsupported = diffusion_loss_unsupported
