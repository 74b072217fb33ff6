"""The gradient of dynamic_threshold, in plain torch.

With S = (1 − f)·|x̂|_(k) + f·|x̂|_(k+1) between the bounds, ∂L/∂S = g goes to the two elements of those ranks:

    ∂x̂ = sign(x̂)·g·(1 − f, f)          ∂x = a_x·∂x̂          ∂m = a_m·∂x̂
    ∂u = r·(1 − w)·∂m          ∂c = r·w·∂m          ∂r = Σ ∂m·(u + w·(c − u))

Outside [1, max] S is a bound, and nothing has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._indices import per_sample
from diffkern.ops._layout import flat_samples
from diffkern.ops._terms import Coefficients, guided_mean, term


def dynamic_threshold_backward(
    x: Tensor,
    mean: Tensor,
    table: Tensor,
    row: Tensor,
    guidance_scale: Tensor | None,
    rescale: Tensor | None,
    ratio: float,
    largest: float,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """∂L/∂x, ∂L/∂mean and ∂L/∂rescale."""
    c = Coefficients(table, row, x)
    guided = guided_mean(x, mean, guidance_scale, rescale)
    x0 = term(c.a_x, x.to(guided.m.dtype)) + term(c.a_m, guided.m)
    d_x0 = _quantile_gradient(flat_samples(x0), ratio, largest, grad).reshape(x0.shape)
    d_m = term(c.a_m, d_x0)
    d_rescale = None
    if guided.rescale is not None:
        d_rescale = flat_samples(d_m * guided.unscaled).double().sum(1)
        d_m = per_sample(guided.rescale.to(d_m.dtype), x) * d_m
    if guidance_scale is not None:
        w = per_sample(guidance_scale.to(d_m.dtype), x)
        d_m = torch.cat([(1 - w) * d_m, w * d_m])
    return term(c.a_x, d_x0).to(x.dtype), d_m.to(mean.dtype), d_rescale


def _quantile_gradient(x0: Tensor, ratio: float, largest: float, grad: Tensor) -> Tensor:
    """∂L/∂x0 of (N, D) values where `grad` (N,) arrives at their clamped quantile."""
    if x0.numel() == 0:
        return torch.zeros_like(x0)
    ordered = x0.abs().double().sort(dim=1)
    # sym_int, sym_min and narrow, because int, min and an index would tie compiled code to this size.
    position = ratio * (x0.shape[1] - 1)
    low = torch.sym_int(position)
    high = torch.sym_min(low + 1, x0.shape[1] - 1)
    fraction = position - low
    lower, upper = (ordered.values.narrow(1, i, 1) for i in (low, high))
    quantile = torch.lerp(lower, upper, fraction)
    g = torch.where((quantile >= 1) & (quantile <= largest), grad.double().unsqueeze(1), 0.0)
    d_magnitude = torch.zeros_like(ordered.values)
    d_magnitude = d_magnitude.scatter_add(1, ordered.indices.narrow(1, low, 1), (1 - fraction) * g)
    d_magnitude = d_magnitude.scatter_add(1, ordered.indices.narrow(1, high, 1), fraction * g)
    return (d_magnitude * x0.sign()).to(x0.dtype)
