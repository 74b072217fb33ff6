"""Guided-diffusion's steps and losses as its users run them: tensor operations in a row, coefficients as full tensors.

Every coefficient is looked up in a float64 NumPy table that goes to the device for each call, and is expanded to the
images' shape before arithmetic, also the arithmetic among coefficients. So an ancestral step with a learned variance
makes 20 passes over tensors of that size, DDIM's 38, and the hybrid loss 73 before its gradient is taken.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffkern.process import GaussianProcess


class GuidedDiffusion:
    """Steps and losses of a process whose network predicts ε and log-variances between log β̃_t and log β_t."""

    def __init__(self, process: GaussianProcess) -> None:
        abar = process.alphas_cumprod
        self.process, self.log_betas = process, np.log(process.betas)
        self.x0_of_x, self.x0_of_eps = np.sqrt(1 / abar), np.sqrt(1 / abar - 1)

    def ancestral(self, output: Tensor, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        mean, log_variance, x0 = self._reverse(output, x, t)
        noise = torch.randn_like(x)
        return {"sample": mean + _not_last(t, x) * torch.exp(0.5 * log_variance) * noise, "pred_xstart": x0}

    def ddim(self, output: Tensor, x: Tensor, t: Tensor, eta: float) -> dict[str, Tensor]:
        _, _, x0 = self._reverse(output, x, t)
        eps = (_at(self.x0_of_x, t, x) * x - x0) / _at(self.x0_of_eps, t, x)
        abar, abar_prev = _at(self.process.alphas_cumprod, t, x), _at(self.process.alphas_cumprod_prev, t, x)
        sigma = eta * torch.sqrt((1 - abar_prev) / (1 - abar)) * torch.sqrt(1 - abar / abar_prev)
        noise = torch.randn_like(x)
        mean = x0 * torch.sqrt(abar_prev) + torch.sqrt(1 - abar_prev - sigma**2) * eps
        return {"sample": mean + _not_last(t, x) * sigma * noise, "pred_xstart": x0}

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        signal, sigma = self.process.sqrt_alphas_cumprod, self.process.sqrt_one_minus_alphas_cumprod
        return _at(signal, t, x0) * x0 + _at(sigma, t, x0) * noise

    def hybrid(self, output: Tensor, x0: Tensor, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The squared error of ε and, with a gradient by the variance's channels alone, the bound's term: (N,)."""
        eps, learned = torch.split(output, x.shape[1], dim=1)
        vb, _ = self.bound_term(torch.cat([eps.detach(), learned], dim=1), x0, x, t, clip=False)
        return _mean(torch.square(noise - eps)) + vb

    def bound_term(self, output: Tensor, x0: Tensor, x: Tensor, t: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
        """The bound's term in bits/dim (N,), the decoder's where t = 0, and the predicted x0."""
        posterior = self._posterior_mean(x0, x, t)
        posterior_log_variance = _at(self.process.posterior_log_variance_clipped, t, x)
        mean, log_variance, predicted = self._reverse(output, x, t, clip)
        kl = 0.5 * (
            log_variance
            - 1.0
            - posterior_log_variance
            + torch.exp(posterior_log_variance - log_variance)
            + torch.square(posterior - mean) * torch.exp(-log_variance)
        )
        inverse = torch.exp(-(0.5 * log_variance))
        upper, lower = (_cdf(inverse * (x0 - mean + edge)) for edge in (1 / 255, -1 / 255))
        first, last, inside = (p.clamp(min=1e-12).log() for p in (upper, 1.0 - lower, upper - lower))
        nll = -torch.where(x0 < -0.999, first, torch.where(x0 > 0.999, last, inside))
        return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2.0), predicted

    def _posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return _at(self.process.posterior_mean_coef1, t, x) * x0 + _at(self.process.posterior_mean_coef2, t, x) * x

    def _reverse(self, output: Tensor, x: Tensor, t: Tensor, clip: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of p(x_{t−1} | x_t), of which the variance is made too, and x0."""
        eps, learned = torch.split(output, x.shape[1], dim=1)
        low, high = _at(self.process.posterior_log_variance_clipped, t, x), _at(self.log_betas, t, x)
        share = (learned + 1) / 2
        log_variance = share * high + (1 - share) * low
        torch.exp(log_variance)
        x0 = _at(self.x0_of_x, t, x) * x - _at(self.x0_of_eps, t, x) * eps
        x0 = x0.clamp(-1, 1) if clip else x0
        return self._posterior_mean(x0, x, t), log_variance, x0


def _at(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    values = torch.tensor(table).to(t.device)[t].float()
    return values.view(-1, *[1] * (like.dim() - 1)).expand(like.shape)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=list(range(1, x.dim())))


def _cdf(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3))))


def _not_last(t: Tensor, like: Tensor) -> Tensor:
    return (t != 0).float().view(-1, *[1] * (like.dim() - 1))
