"""The gradient of guidance_rescale, in plain torch.

With D values a sample, c̄ and m̄ the means, σ_c and σ_m the deviations and g = φ·∂L/∂r:

    ∂σ_c/∂c = (c − c̄)/((D − 1)·σ_c)          p = g/σ_m·∂σ_c/∂c
    ∂σ_m/∂m = (m − m̄)/((D − 1)·σ_m)          q = −g·σ_c/σ_m²·∂σ_m/∂m
    ∂u = (1 − w)·q                           ∂c = p + w·q

A deviation of 0 has no slope; its gradient is 0, as torch.std's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._indices import per_sample
from diffkern.ops._layout import flat_samples


def guidance_rescale_backward(model_output: Tensor, guidance_scale: Tensor, phi: float, grad: Tensor) -> Tensor:
    uncond, cond = flat_samples(model_output).double().chunk(2)
    if cond.shape[1] < 2 or cond.shape[0] == 0:
        return torch.zeros_like(model_output)
    w = per_sample(guidance_scale, uncond)
    guided = uncond + w * (cond - uncond)
    g = phi * grad.double().unsqueeze(1)
    std_cond, std_guided = cond.std(1, keepdim=True), guided.std(1, keepdim=True)
    of_cond = _through_std(cond, std_cond, g / std_guided)
    of_guided = _through_std(guided, std_guided, -g * std_cond / std_guided.square())
    d_output = torch.cat([(1 - w) * of_guided, of_cond + w * of_guided])
    return d_output.reshape(model_output.shape).to(model_output.dtype)


def _through_std(values: Tensor, std: Tensor, grad: Tensor) -> Tensor:
    """The gradient of (N, D) values where `grad` (N, 1) arrives at their deviations `std`."""
    slope = (values - values.mean(1, keepdim=True)) / ((values.shape[1] - 1) * std)
    return torch.where(std == 0, 0.0, grad * slope)
