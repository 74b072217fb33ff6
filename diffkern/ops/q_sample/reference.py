"""q_sample as the formula reads."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._indices import check_values, gather, per_sample
from diffkern.ops._layout import dense, in_layout_of
from diffkern.ops.philox_normal.reference import normals


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
    compute = torch.float64 if x0.dtype == torch.float64 else torch.float32
    check_values("t", t, sqrt_alphas_cumprod.shape[0])
    like = dense(x0)
    if noise is None:
        assert seed is not None and draw is not None and samples is not None
        noise = normals(x0.shape, seed, draw, samples, stream)
    noise = noise.to(compute)
    signal = per_sample(gather(sqrt_alphas_cumprod, t).to(compute), x0)
    sigma = per_sample(gather(sqrt_one_minus_alphas_cumprod, t).to(compute), x0)
    x_t = in_layout_of((signal * x0.to(compute) + sigma * noise).to(x0.dtype), like)
    return x_t, in_layout_of(noise.to(x0.dtype), like) if return_noise else x0.new_empty(0)


def q_sample_unsupported(*args: object) -> None:
    return None
