"""The variational bound's terms as they are usually written: means, log-variances, a KL, a CDF; gradients by autograd.

In float32 that is what a user of PyTorch would have written. In float64, where it is the oracle, differences that lose
digits are written out: what is off by 1e-15 of a mean may be the whole of a KL.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.process.gaussian import ProcessTables
from tests.ops.oracles import expand


def vb_terms(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    *,
    target: str,
    variance: str,
    noise: Tensor | None = None,
    x_t: Tensor | None = None,
    levels: int = 256,
    decoder: str = "tanh",
    clip: tuple[float, float] | None = None,
    stops_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(vb, mse, x0_mse), each (N,), in model_output's dtype."""
    dtype = model_output.dtype

    def at(table: Tensor) -> Tensor:
        return expand(table[t].to(dtype), x0)

    x0 = x0.to(dtype)
    s, sigma = at(tables.sqrt_alphas_cumprod), at(tables.sqrt_one_minus_alphas_cumprod)
    coef1, coef2 = at(tables.posterior_mean_coef1), at(tables.posterior_mean_coef2)
    if x_t is None:
        x_t = s * x0 + sigma * noise.to(dtype)
    else:
        x_t = x_t.to(dtype)
        noise = (x_t - s * x0) / sigma
    learned = variance.startswith("learned")
    m, channels = (model_output[:, : x0.shape[1]], model_output[:, x0.shape[1] :]) if learned else (model_output, None)
    true_mean = coef1 * x0 + coef2 * x_t
    of_target = {
        "eps": lambda: (noise, (x_t - sigma * m) / s),
        "x0": lambda: (x0, m),
        "v": lambda: (s * noise - sigma * x0, s * x_t - sigma * m),
        "x_prev": lambda: (true_mean, (m - coef2 * x_t) / coef1),
        "flow": lambda: (noise - x0, (x_t - sigma * m) / (s + sigma)),
    }
    wanted, predicted = of_target[target]()
    if dtype == torch.float64:
        off = {"eps": sigma / s, "x0": -1, "v": sigma, "x_prev": -1 / coef1, "flow": sigma / (s + sigma)}[target]
        error = off * (m - wanted)
        predicted = x0 - error
    if clip is not None:
        predicted = predicted.clamp(*clip)
    mean = m if target == "x_prev" else coef1 * predicted + coef2 * x_t
    if stops_mean:
        mean = mean.detach()
    difference = true_mean - mean
    if dtype == torch.float64:
        difference = coef1 * (error if clip is None or target == "x_prev" else x0 - predicted)
        difference = difference.detach() if stops_mean else difference
    small, log_betas = at(tables.posterior_log_variance_clipped), at(tables.log_betas)
    if variance == "learned":
        log_var = channels
    elif variance == "learned_range":
        log_var = small + (channels + 1) / 2 * (log_betas - small)
    else:
        log_var = (torch.where(expand(t == 0, x0), small, log_betas) if variance == "fixed_large" else small).expand_as(mean)
    # Whatever is not used must be finite, or its gradient would show.
    first = expand(t == 0, x0)
    kl = normal_kl(difference, small, log_var)
    nll = -log_likelihood(torch.where(first, difference, 0.0), torch.where(first, log_var, 0.0), x0, levels, decoder)
    bound = torch.where(first, nll, kl)
    size = x0[:1].numel() if len(x0) else 1
    means = [part.reshape(len(t), size).mean(1) for part in (bound, (m - wanted).square(), (predicted - x0).square())]
    return means[0] / math.log(2), means[1], means[2]


def normal_kl(difference: Tensor, log_var1: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) ‖ N(mean2, var2)) in nats, difference = mean1 − mean2."""
    squared = difference.square() * torch.exp(-log_var2)
    if difference.dtype == torch.float64:
        delta = log_var2 - log_var1
        return 0.5 * (delta + torch.expm1(-delta) + squared)
    return 0.5 * (-1 + log_var2 - log_var1 + torch.exp(log_var1 - log_var2) + squared)


def log_likelihood(difference: Tensor, log_var: Tensor, x0: Tensor, levels: int, decoder: str) -> Tensor:
    """log of the probability of x0's bin under a Gaussian whose mean is x0 − difference."""
    half, inverse = 1 / (levels - 1), torch.exp(-log_var / 2)
    upper, lower = (difference + half) * inverse, (difference - half) * inverse
    end = max(0.999, 1 - half)
    if decoder == "exact":
        log_cdf, log_survival = torch.special.log_ndtr, lambda z: torch.special.log_ndtr(-z)
    else:
        logit = [2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3) for z in (upper, lower)]
        if difference.dtype == torch.float32:
            cdf = [torch.sigmoid(u) for u in logit]
            probability = torch.where(x0 < -end, cdf[0], torch.where(x0 > end, 1 - cdf[1], cdf[0] - cdf[1]))
            return probability.clamp(min=1e-12).log()
        upper, lower = logit
        log_cdf, log_survival = torch.nn.functional.logsigmoid, lambda u: torch.nn.functional.logsigmoid(-u)
    # log(F(b) − F(a)) where both are at most ½, by the symmetry of F.
    flipped = upper + lower > 0
    b, a = torch.where(flipped, -lower, upper), torch.where(flipped, -upper, lower)
    log_b, log_a = log_cdf(b), log_cdf(a)
    apart = log_a - log_b
    # ln(1 − e^apart): each form where it keeps its digits.
    less = torch.where(apart < -0.7, torch.log1p(-torch.exp(apart)), torch.log(-torch.expm1(apart)))
    inside = log_b + less
    log_probability = torch.where(x0 < -end, log_cdf(upper), torch.where(x0 > end, log_survival(lower), inside))
    return log_probability if decoder == "exact" else log_probability.clamp(min=math.log(1e-12))
