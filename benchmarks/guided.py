"""A guided-diffusion step as its users run it: one tensor operation after another, coefficients as full tensors.

Every coefficient is looked up in a float64 NumPy table that goes to the device for each call, and is expanded to the
images' shape before arithmetic, also the arithmetic among coefficients. So an ancestral step with a learned variance
makes 20 passes over tensors of that size, DDIM's 38.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffkern.process import GaussianProcess


class GuidedSteps:
    """Steps of a process whose network predicts ε and log-variances between log β̃_t and log β_t; x0 is clipped."""

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

    def _reverse(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of p(x_{t−1} | x_t), of which the variance is made too, and x0."""
        eps, learned = torch.split(output, x.shape[1], dim=1)
        low, high = _at(self.process.posterior_log_variance_clipped, t, x), _at(self.log_betas, t, x)
        share = (learned + 1) / 2
        log_variance = share * high + (1 - share) * low
        torch.exp(log_variance)
        x0 = (_at(self.x0_of_x, t, x) * x - _at(self.x0_of_eps, t, x) * eps).clamp(-1, 1)
        mean = _at(self.process.posterior_mean_coef1, t, x) * x0 + _at(self.process.posterior_mean_coef2, t, x) * x
        return mean, log_variance, x0


def _at(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    values = torch.tensor(table).to(t.device)[t].float()
    return values.view(-1, *[1] * (like.dim() - 1)).expand(like.shape)


def _not_last(t: Tensor, like: Tensor) -> Tensor:
    return (t != 0).float().view(-1, *[1] * (like.dim() - 1))
