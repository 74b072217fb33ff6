"""q_sample on a GPU.

Reads x0 once (and given noise), writes x_t once (and ε where it is asked for): 8 bytes an element in float32, 4 in 16
bits. With generated normals the kernel has about 46 and 38 instructions an element, of which an H200 can issue 55 and
28 in the time that its memory takes: float32 is bound by memory, 16 bits by the instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._indices import check_values
from diffkern.ops._layout import empty_like_layout, float32_dense, sample_dense, sample_shape
from diffkern.ops._torch_draws import TorchDraws
from diffkern.ops._triton import launch
from diffkern.ops._triton.arithmetic import fma
from diffkern.ops._triton.elementwise import counter_arguments, tiling, torch_arguments, torch_tiling
from diffkern.ops._triton.tile import TORCH, normals, place, table_value


@triton.jit(do_not_specialize=["seed", "draw"])
def q_sample_kernel(
    x0,
    x0_stride,
    given,
    given_stride,
    x_t,
    noise_out,
    t,
    signals,
    sigmas,
    num_timesteps,
    seed,
    draw,
    samples,
    stream,
    blocks,
    size,
    channels,
    pixels,
    GIVEN: tl.constexpr,
    RETURNS_NOISE: tl.constexpr,
    FAST: tl.constexpr,
    DRAWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, base, offsets, inside, counter, lane = place(
        tl.program_id(0), blocks, size, channels, pixels, BLOCK, ORDER, WIDTH
    )
    x = tl.load(x0 + n * x0_stride + base + offsets, inside).to(tl.float32)
    if GIVEN:
        z = tl.load(given + n * given_stride + base + offsets, inside).to(tl.float32)
    else:
        z = normals(counter, lane, n, seed, draw, samples, stream, DRAWS, SAMPLES, BLOCK, ORDER, FAST)
    if ORDER == TORCH:
        z = z.to(x_t.dtype.element_ty).to(tl.float32)  # torch would have stored it
    index = tl.load(t + n)
    signal = table_value(signals, index, num_timesteps)
    sigma = table_value(sigmas, index, num_timesteps)
    out = n * size + base + offsets
    tl.store(x_t + out, fma(z, sigma, x * signal), inside)
    if RETURNS_NOISE:
        tl.store(noise_out + out, z, inside)


def q_sample(
    x0: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    draw: Tensor | None,
    samples: Tensor | None,
    stream: int,
    return_noise: bool,
    draws: TorchDraws | None = None,
) -> tuple[Tensor, Tensor]:
    """`draws`: where torch's own generator stands, whose numbers are then made; there is neither noise nor seed."""
    check_values("t", t, sqrt_alphas_cumprod.shape[0])
    x_t = empty_like_layout(x0)
    noise_out = empty_like_layout(x0) if return_noise else x0.new_empty(0)
    channels_last = sample_shape(x0)[3]
    if draws is None:
        tiles, source = tiling(x_t, generates=noise is None), counter_arguments(seed, draw, samples, stream)
    else:
        tiles, source = torch_tiling(x_t, draws), torch_arguments(draws)
    x0, given = sample_dense(x0, channels_last), float32_dense(noise, channels_last)
    launch.launch(
        q_sample_kernel,
        tiles.programs,
        x0.device,
        num_warps=tiles.num_warps,
        x0=x0,
        x0_stride=x0.stride(0),
        given=given,
        given_stride=0 if given is None else given.stride(0),
        x_t=x_t,
        noise_out=noise_out if return_noise else None,
        t=t.contiguous(),
        signals=sqrt_alphas_cumprod.contiguous(),
        sigmas=sqrt_one_minus_alphas_cumprod.contiguous(),
        num_timesteps=sqrt_alphas_cumprod.shape[0],
        **source,
        **tiles.arguments,
        GIVEN=given is not None,
        RETURNS_NOISE=return_noise,
        FAST=x0.dtype != torch.float32,
    )
    return x_t, noise_out


def q_sample_unsupported(x0: Tensor, *rest: object) -> str | None:
    return launch.unsupported(x0)
