"""The gradient of solver_step, in plain torch: sampling rarely needs it, and autocast, vmap and compile handle it.

With g = ∂L/∂x' + s·∂L/∂x_in and x̂ = a_x·x + a_m·m, the x0 before clamping:

    ∂x̂ = c_0·g/s_n where lo·s_n ≤ x̂ ≤ hi·s_n, else 0        ∂x = c_x·g + a_x·∂x̂      ∂m = c_m·g + a_m·∂x̂
    ∂u = r·(1 − w)·∂m    ∂c = r·w·∂m    ∂r = Σ ∂m·(u + w(c − u))    ∂s_n = −Σ ∂x̂·x̂/s_n
    ∂e = (c_e + c_v·σ²)·g                 ∂log σ² = g·(c_z·σ·z/2 + c_v·σ²·e)

Slots take no gradient (docs of the op).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._indices import per_sample
from diffkern.ops._layout import flat_samples
from diffkern.ops._terms import (
    Coefficients,
    Mean,
    compute_dtype,
    guided_mean,
    learned_sigma,
    term,
    threshold_or_one,
)
from diffkern.ops.philox_normal.op import OP as PHILOX_NORMAL


def solver_step_backward(
    inputs: Sequence[Any], grad_next: Tensor, grad_in: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the op's arguments in the schema's order."""
    (x, model_output, table, _, row, _, scale, rescale, threshold, extra, noise, seed, samples, stream, clip,
     variance, scales_input) = inputs  # fmt: skip
    compute = compute_dtype(x)
    c = Coefficients(table, row, x)
    g = grad_next.to(compute)
    if scales_input and grad_in is not None:
        g = g + c.s * grad_in.to(compute)
    mean = guided_mean(x, model_output, scale, rescale)

    d_x0 = term(c.c_0, g)
    d_threshold = None
    if clip is not None:
        x0 = term(c.a_x, x.to(compute)) + term(c.a_m, mean.m)
        s = threshold_or_one(threshold, x)
        inside = (x0 >= clip[0] * s) & (x0 <= clip[1] * s)
        d_x0 = torch.where(inside, d_x0 / s, 0.0)
        if threshold is not None:
            d_threshold = -flat_samples(torch.where(inside, d_x0 * x0 / s, 0.0)).double().sum(1)
    d_mean = term(c.c_m, g) + term(c.a_m, d_x0)

    sigma = learned_sigma(x, model_output, c, variance)
    d_var = None
    if sigma is not None:
        if noise is None and seed is not None:
            noise = PHILOX_NORMAL(list(x.shape), seed, row, samples, stream, compute, False)
        d_log = torch.zeros_like(g)
        if noise is not None:
            d_log = d_log + term(c.c_z, g * sigma * noise.to(compute) / 2)
        if extra is not None:
            d_log = d_log + term(c.c_v, g * sigma.square() * extra.to(compute))
        d_var = d_log * (c.log_var_max - c.log_var_min) / 2 if variance == 2 else d_log

    grads: list[Tensor | None] = [None] * len(inputs)
    if needs[0]:
        grads[0] = (term(c.c_x, g) + term(c.a_x, d_x0)).to(x.dtype)
    if needs[1]:
        grads[1] = _model_output_gradient(x, scale, mean, d_mean, d_var).to(model_output.dtype)
    if rescale is not None and needs[7]:
        grads[7] = flat_samples(d_mean * mean.unscaled).double().sum(1)
    if threshold is not None and needs[8]:
        grads[8] = d_threshold
    if extra is not None and needs[9]:
        of_variance = g if sigma is None else sigma.square() * g
        grads[9] = (term(c.c_e, g) + term(c.c_v, of_variance)).to(extra.dtype)
    return tuple(grads)


def _model_output_gradient(x: Tensor, scale: Tensor | None, mean: Mean, d_mean: Tensor, d_var: Tensor | None) -> Tensor:
    """∂L/∂model_output: both halves of the batch under guidance, both halves of the channels if Σ is learned."""
    if scale is None:
        return d_mean if d_var is None else torch.cat([d_mean, d_var], dim=1)
    w = per_sample(scale.to(d_mean.dtype), x)
    if mean.rescale is not None:
        d_mean = per_sample(mean.rescale.to(d_mean.dtype), x) * d_mean
    d_output = torch.cat([(1 - w) * d_mean, w * d_mean])
    if d_var is None:
        return d_output
    return torch.cat([d_output, torch.cat([torch.zeros_like(d_var), d_var])], dim=1)
