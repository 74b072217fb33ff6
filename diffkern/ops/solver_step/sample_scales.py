"""r_n and s_n: per-sample scalars that a step needs before its pass, from exact reductions over the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._layout import flat_samples
from diffkern.ops.solver_step.terms import Coefficients, guided_mean, term


def guidance_rescale_factor(model_output: Tensor, x: Tensor, guidance_scale: Tensor | None, phi: float) -> Tensor:
    """r = φ·std(c)/std(m) + 1 − φ per sample (Lin et al. 2023, arXiv 2305.08891, eqs. 15–16), float64 (N,).

    1 where a sample has fewer than two values, of which there is no standard deviation.
    """
    mean = guided_mean(x, model_output, guidance_scale, None)
    assert mean.cond is not None
    if flat_samples(x).shape[1] < 2 or x.shape[0] == 0:
        return torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    ratio = flat_samples(mean.cond).double().std(1) / flat_samples(mean.m).double().std(1)
    return phi * ratio + (1 - phi)


def threshold_scale(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    guidance_scale: Tensor | None,
    rescale: Tensor | None,
    threshold: tuple[float, float],
) -> Tensor:
    """s = the `ratio` quantile of |x0| clamped to [1, max] per sample (Saharia et al. 2022, §2.3), float64 (N,).

    Quantiles are linearly interpolated between order statistics.
    """
    ratio, largest = threshold
    c = Coefficients(table, row, x)
    m = guided_mean(x, model_output, guidance_scale, rescale).m
    x0 = flat_samples(term(c.a_x, x.to(m.dtype)) + term(c.a_m, m)).abs().double()
    if x0.shape[1] == 0:
        return torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    position = ratio * (x0.shape[1] - 1)
    low = int(position)
    ordered = x0.sort(dim=1).values
    # narrow, because an index would tie compiled code to this size.
    lower, upper = (ordered.narrow(1, i, 1).squeeze(1) for i in (low, min(low + 1, x0.shape[1] - 1)))
    return torch.lerp(lower, upper, position - low).clamp(1.0, largest)
