"""vb_terms on a GPU, and the pass that gives their gradient too.

Everything follows from the residual r = m − (of_y·y + of_x0·x0), y = ε or x_t: x0 − x̂0 is x0_scale·r, the means of
posterior and model are coef1 times as far apart, and with Δ = ln σ² − ln β̃ the term is for t > 0
½(Δ + e^−Δ − 1 + e^−Δ·(μ̃ − μ)²/β̃), for t = 0 the discretised Gaussian at x0.

Reads the network's output, y (or computes it) and x0 where target, clip or decoder need it; writes the gradient and
three numbers a sample: with generated noise 16 bytes a value of x0 in float32 for the hybrid loss of an ε network. One
exponential an element where the variance is learned, none where it is fixed: as in q_sample the noise has most of the
instructions. Only programs of a sample at t = 0 run the decoder. The sums are those of _triton/reduce.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._indices import check_values
from diffkern.ops._layout import empty_like_layout, float32_dense, is_channels_last, sample_dense, sample_shape
from diffkern.ops._triton import launch
from diffkern.ops._triton.arithmetic import fma
from diffkern.ops._triton.discretised_gaussian import decode_exact, decode_tanh
from diffkern.ops._triton.elementwise import counter_arguments
from diffkern.ops._triton.exponentials import exp2_of_minus, exp_of_scalar, exp_remainder
from diffkern.ops._triton.reduce import is_last, joined, reduction, share, total
from diffkern.ops._triton.tile import normals, place_in_sample
from diffkern.ops.vb_terms.coefficients import COLUMNS
from diffkern.ops.vb_terms.decoder import end_of, half_bin

WIDTH_OF_TABLE = tl.constexpr(len(COLUMNS))


@triton.jit
def vb_terms_kernel(
    output,
    output_stride,
    x0,
    x0_stride,
    given,
    given_stride,
    grad,
    terms,
    t,
    coefficients,
    num_timesteps,
    scales,
    levels,
    half,
    end_level,
    low,
    high,
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
    all_samples,
    segments,
    parts,
    per_program,
    READS_Y: tl.constexpr,
    GIVEN: tl.constexpr,
    X0_IN_TARGET: tl.constexpr,
    MEAN_OF_X0: tl.constexpr,
    CLIP: tl.constexpr,
    EXACT: tl.constexpr,
    LEARNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GRADIENT: tl.constexpr,
    STOPS_MEAN: tl.constexpr,
    SCALES: tl.constexpr,
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
    n, first_segment, end = share(tl.program_id(0), parts, segments, per_program)
    index = tl.load(t + n)
    at_zero = index == 0
    # A sample's numbers are products of float64 ones: roundings in float32 would be shared by all its elements, whose
    # mean would not lose them.
    row = coefficients + tl.minimum(tl.maximum(index, 0), num_timesteps - 1) * WIDTH_OF_TABLE
    valid = tl.where((index >= 0) & (index < num_timesteps), 1.0, float("nan")).to(tl.float64)
    of_y = (tl.load(row) * valid).to(tl.float32)
    of_x0 = (tl.load(row + 1) * valid).to(tl.float32)
    x0_scale = tl.load(row + 2) * valid
    coef1, log_var = tl.load(row + 3) * valid, tl.load(row + 4) * valid
    bias, slope = tl.load(row + 5) * valid, tl.load(row + 6) * valid
    # What the base of the bound's difference, x0 − x̂0 where that is clipped and r elsewhere, is multiplied with.
    if CLIP and MEAN_OF_X0:
        of_base = x0_scale
        factor = coef1
    else:
        of_base = valid
        factor = coef1 * x0_scale
    root = factor * exp_of_scalar(-0.5 * log_var)
    squares_factor = (root * root).to(tl.float32)
    difference_factor = factor.to(tl.float32)
    error_factor = x0_scale.to(tl.float32)
    fixed_precision = exp_of_scalar(-bias)
    fixed_log_var = (log_var + bias).to(tl.float32)
    delta_bias, delta_slope = bias.to(tl.float32), slope.to(tl.float32)
    rate = slope * 1.4426950408889634  # of the exponent of 2
    rate_high = rate.to(tl.float32)
    rate_rest = (rate - rate_high.to(tl.float64)).to(tl.float32)
    if GRADIENT:
        if SCALES:
            scales += n * 3
        each = 1.0 / size
        of_residual = (2.0 * tl.load(scales)).to(tl.float32) * each
        of_vb = (tl.load(scales + 1) * 1.4426950408889634).to(tl.float32) * each
        of_x0_error = (2.0 * tl.load(scales + 2) * x0_scale).to(tl.float32) * each
        of_variance = of_vb * delta_slope
        of_bound = of_vb * of_base.to(tl.float32)
        of_bound *= tl.where(at_zero, difference_factor, squares_factor)

    variance_at = channels if INTERLEAVED else size
    output += n * output_stride
    if GRADIENT:
        grad += n * size * (2 if LEARNED else 1)
    for segment in range(first_segment, end):
        squares = tl.zeros([BLOCK], tl.float32)
        bounds = tl.zeros([BLOCK], tl.float32)
        x0_squares = tl.zeros([BLOCK], tl.float32)
        for tile in range(segment * TILES, tl.minimum((segment + 1) * TILES, blocks)):
            base, offsets, inside, counter, lane = place_in_sample(tile, size, channels, pixels, BLOCK, ORDER, WIDTH)
            if INTERLEAVED:
                # A pixel's mean and variance lie side by side: before it there are as many values of each.
                pixel = ((base % channels).to(tl.int32) + offsets) // channels
                mean_base, mean_offsets = base + base // channels * channels, offsets + pixel * channels
            else:
                mean_base, mean_offsets = base, offsets
            if X0_IN_TARGET or CLIP:
                x = tl.load(x0 + n * x0_stride + base + offsets, inside).to(tl.float32)
            if READS_Y:
                if GIVEN:
                    y = tl.load(given + n * given_stride + base + offsets, inside).to(tl.float32)
                else:
                    y = normals(counter, lane, n, seed, draw, samples, stream, DRAWS, SAMPLES, BLOCK, ORDER, FAST)
            # Which product is fused is said, so that the terms have the same bits with and without the gradient.
            if X0_IN_TARGET and READS_Y:
                target = fma(of_y, y, of_x0 * x)
            elif X0_IN_TARGET:
                target = of_x0 * x
            else:
                target = of_y * y
            residual = tl.load(output + mean_base + mean_offsets, inside).to(tl.float32) - target
            difference_base = residual
            x0_error = error_factor * residual
            if CLIP:
                predicted = fma(-error_factor, residual, x)
                below, above = predicted < low, predicted > high
                x0_error = x - tl.where(below, low, tl.where(above, high, predicted))
                if MEAN_OF_X0:
                    difference_base = x0_error
            if LEARNED:
                variance = tl.load(output + variance_at + mean_base + mean_offsets, inside).to(tl.float32)
                delta = fma(delta_slope, variance, delta_bias)
                log_variance = fma(delta_slope, variance, fixed_log_var)
            else:
                log_variance = fixed_log_var
            if at_zero:
                if X0_IN_TARGET or CLIP:
                    level = x
                else:
                    level = tl.load(x0 + n * x0_stride + base + offsets, inside).to(tl.float32)
                off = difference_factor * difference_base
                if EXACT:
                    value, of_mean, of_delta = decode_exact(off, log_variance, level, levels, end_level)
                else:
                    value, of_mean, of_delta = decode_tanh(off, log_variance, level, half, end_level)
                bound = 2.0 * value
            else:
                if LEARNED:
                    e = fixed_precision * exp2_of_minus(rate_high, rate_rest, variance)
                    squared = squares_factor * difference_base * difference_base
                    remainder, derivative = exp_remainder(delta, e)
                    bound = fma(e, squared, remainder)
                    of_mean = e * difference_base
                    of_delta = 0.5 * fma(-e, squared, derivative)
                else:
                    bound = fixed_precision * (squares_factor * difference_base * difference_base)
                    of_mean = fixed_precision * difference_base
                    of_delta = of_mean
            if GRADIENT:
                # What has no share in the gradient may be infinite.
                gradient = tl.where(of_residual != 0.0, of_residual * residual, 0.0)
                of_error = of_x0_error * x0_error
                of_mean = of_bound * of_mean
                if CLIP:
                    outside = below | above
                    of_error = tl.where(outside, 0.0, of_error)
                    if MEAN_OF_X0:
                        of_mean = tl.where(outside, 0.0, of_mean)
                gradient += tl.where(of_x0_error != 0.0, of_error, 0.0)
                if not STOPS_MEAN:
                    gradient += tl.where(of_bound != 0.0, of_mean, 0.0)
                tl.store(grad + mean_base + mean_offsets, gradient, inside)
                if LEARNED:
                    of_delta = tl.where(of_variance != 0.0, of_variance * of_delta, 0.0)
                    tl.store(grad + variance_at + mean_base + mean_offsets, of_delta, inside)
            residual = tl.where(inside, residual, 0.0)
            squares = fma(residual, residual, squares)
            bounds += tl.where(inside, bound, 0.0)
            if CLIP:
                x0_error = tl.where(inside, x0_error, 0.0)
                x0_squares = fma(x0_error, x0_error, x0_squares)
        at = sums + n * segments + segment
        tl.store(at, total(squares, BLOCK, STEPS))
        tl.store(at + all_samples * segments, total(bounds, BLOCK, STEPS))
        if CLIP:
            tl.store(at + 2 * all_samples * segments, total(x0_squares, BLOCK, STEPS))
    if is_last(counters, n, parts, SPLIT):
        at = sums + n * segments
        mse = joined(at, segments) / size
        vb = joined(at + all_samples * segments, segments) / size
        if not LEARNED:
            remainder, derivative = exp_remainder(delta_bias, fixed_precision)
            vb += tl.where(at_zero, 0.0, remainder)
        if CLIP:
            x0_mse = joined(at + 2 * all_samples * segments, segments) / size
        else:
            x0_mse = x0_scale * x0_scale * mse
        tl.store(terms + n * 3, mse)
        tl.store(terms + n * 3 + 1, vb * 0.7213475204444817)  # twice the bound was summed, in nats
        tl.store(terms + n * 3 + 2, x0_mse)


def vb_terms(*arguments: Any) -> Tensor:
    return _run(None, *arguments)


def vb_terms_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    grad = empty_like_layout(arguments[0])
    return _run(grad, *arguments), grad


def _run(
    grad: Tensor | None,
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    draw: Tensor | None,
    samples: Tensor | None,
    stream: int,
    target: str,
    x0_in_target: bool,
    learned: bool,
    stops_mean: bool,
    levels: int,
    decoder: str,
    clip: list[float] | None,
    scale: Tensor | None = None,
) -> Tensor:
    """The terms; their gradient goes into `grad`, if that is given, times `scale`."""
    check_values("t", t, coefficients.shape[0])
    channels_last = is_channels_last(model_output)
    shape = (*sample_shape(x0)[:3], channels_last)
    work = reduction(shape, model_output.device, noise is None and seed is not None, count=3)
    output = sample_dense(model_output, channels_last)
    data, noise = float32_dense(x0, channels_last), float32_dense(noise, channels_last)
    assert data is not None
    terms = model_output.new_empty((shape[0], 3), dtype=torch.float32)
    low, high = (0.0, 0.0) if clip is None else clip
    launch.launch(
        vb_terms_kernel,
        work.programs,
        model_output.device,
        num_warps=work.num_warps,
        output=output,
        output_stride=output.stride(0),
        x0=data,
        x0_stride=data.stride(0),
        given=noise,
        given_stride=0 if noise is None else noise.stride(0),
        grad=grad,
        terms=terms,
        t=t.contiguous(),
        coefficients=coefficients.contiguous(),
        num_timesteps=coefficients.shape[0],
        scales=None if scale is None else scale.contiguous(),
        levels=levels,
        half=half_bin(levels),
        end_level=end_of(levels),
        low=low,
        high=high,
        **counter_arguments(seed, draw, samples, stream),
        **work.arguments,
        all_samples=shape[0],
        READS_Y=noise is not None or seed is not None,
        GIVEN=noise is not None,
        X0_IN_TARGET=x0_in_target,
        MEAN_OF_X0=target != "x_prev",
        CLIP=clip is not None,
        EXACT=decoder == "exact",
        LEARNED=learned,
        INTERLEAVED=learned and channels_last,
        GRADIENT=grad is not None,
        STOPS_MEAN=stops_mean,
        SCALES=scale is not None and scale.dim() > 1,
        FAST=model_output.dtype != torch.float32,
    )
    return terms


def vb_terms_unsupported(*arguments: Any) -> str | None:
    return launch.unsupported(arguments[0])


vb_terms_and_grad_unsupported = vb_terms_unsupported
