"""diffusion_loss as the formula reads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._indices import check_values, gather, per_sample
from diffkern.ops._layout import dense, flat_samples, in_layout_of
from diffkern.ops.diffusion_loss.op import compute_dtype
from diffkern.ops.philox_normal.reference import normals


def diffusion_loss(*arguments: Any) -> Tensor:
    return _loss(*_residual_and_weight(*arguments))


def diffusion_loss_and_grad(model_output: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *others, scale = rest
    residual, weight = _residual_and_weight(model_output, *others)
    size = max(math.prod(residual.shape[1:]), 1)
    slope = per_sample((scale * weight * 2.0 / size).to(residual.dtype), residual)
    grad = in_layout_of((slope * residual).to(model_output.dtype), dense(model_output))
    return _loss(residual, weight), grad


def _loss(residual: Tensor, weight: Tensor) -> Tensor:
    return (weight * flat_samples(residual).double().square().mean(1)).to(residual.dtype)


def _residual_and_weight(
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
) -> tuple[Tensor, Tensor]:
    """model_output − target in the arithmetic's dtype, and the weights (N,) in float64."""
    check_values("t", t, sqrt_alphas_cumprod.shape[0])
    # 1, or NaN where nobody could raise an error for the index.
    valid = gather(torch.ones_like(sqrt_alphas_cumprod), t)
    compute = compute_dtype(model_output)
    if noise is None and target != "x0":
        assert seed is not None and draw is not None and samples is not None
        noise = normals(model_output.shape, seed, draw, samples, stream)
    if target == "eps":
        assert noise is not None
        values = noise.to(compute)
    elif target == "x0":
        assert x0 is not None
        values = x0.to(compute)
    else:
        assert x0 is not None and noise is not None
        signal = per_sample(gather(sqrt_alphas_cumprod, t).to(compute), x0)
        sigma = per_sample(gather(sqrt_one_minus_alphas_cumprod, t).to(compute), x0)
        values = signal * noise.to(compute) - sigma * x0.to(compute)
    return model_output.to(compute) - values, valid if weight is None else valid * weight.double()


def diffusion_loss_unsupported(*args: object) -> None:
    return None


def diffusion_loss_and_grad_unsupported(*args: object) -> None:
    return None
