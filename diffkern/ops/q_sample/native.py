"""q_sample through csrc/cpu/q_sample.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import sample_dense, sample_shape
from diffkern.ops._native import counter_source, cpu_only, num_threads, operand, output_like


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
) -> tuple[Tensor, Tensor]:
    x_t = output_like(x0)
    noise_out = output_like(x0) if return_noise else x0.new_empty(0)
    shape = sample_shape(x0)
    channels_last = shape[3]
    double = torch.float64 if x0.dtype == torch.float64 else None
    signal, sigma = sqrt_alphas_cumprod.double().contiguous(), sqrt_one_minus_alphas_cumprod.double().contiguous()
    t = t.contiguous()
    x0 = sample_dense(x0, channels_last)
    source = given = None
    if noise is not None:
        noise = sample_dense(noise, channels_last, double or (torch.float32 if noise.dtype == torch.float64 else None))
        given = operand(noise)
    else:
        assert seed is not None and draw is not None and samples is not None
        samples = samples.contiguous()
        source = counter_source(seed, draw, samples, stream)
    native_module().q_sample(
        shape=shape,
        x0=operand(x0),
        noise=given,
        source=source,
        t=t.data_ptr(),
        sqrt_alphas_cumprod=signal.data_ptr(),
        sqrt_one_minus_alphas_cumprod=sigma.data_ptr(),
        num_timesteps=signal.shape[0],
        x_t=operand(sample_dense(x_t, channels_last)),
        noise_out=operand(sample_dense(noise_out, channels_last)) if return_noise else None,
        num_threads=num_threads(x_t.numel()),
    )
    return x_t, noise_out


def q_sample_unsupported(x0: Tensor, *rest: object) -> str | None:
    return cpu_only(x0)
