"""The variational bound as a good user writes it: coefficients gathered on the device and broadcast, then autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffkern.process.gaussian import ProcessTables


class EagerBound:
    """Of a network that predicts ε, and log-variances between log β̃_t and log β_t; 256 grey levels."""

    def __init__(self, tables: ProcessTables) -> None:
        names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped", "log_betas")
        self.signal, self.sigma = tables.sqrt_alphas_cumprod.float(), tables.sqrt_one_minus_alphas_cumprod.float()
        self.coef1, self.coef2, self.low, self.high = (getattr(tables, name).float() for name in names)

    def hybrid_and_grad(
        self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """mse + vb (N,), vb training the variance alone, and the gradient of scale·Σ of it; output is a leaf."""
        eps, channels = output.chunk(2, dim=1)
        x_t = _at(self.signal, t) * x0 + _at(self.sigma, t) * noise
        loss = mse_loss(eps, noise, reduction="none").mean((1, 2, 3))
        loss = loss + self.term(torch.cat([eps.detach(), channels], dim=1), x0, x_t, t)
        return loss.detach(), torch.autograd.grad(scale * loss.sum(), output)[0]

    def term(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term at t in bits/dim, (N,)."""
        eps, channels = output.chunk(2, dim=1)
        low, high = _at(self.low, t), _at(self.high, t)
        log_variance = torch.lerp(low, high, (channels + 1) / 2)
        predicted = (x_t - _at(self.sigma, t) * eps) / _at(self.signal, t)
        # Both means have the same share of x_t; what is at t = 0 has none of it.
        difference = _at(self.coef1, t) * (x0 - predicted)
        precision = torch.exp(-log_variance)
        kl = 0.5 * (log_variance - low - 1 + torch.exp(low) * precision + difference.square() * precision)
        deviation = torch.exp(-0.5 * log_variance)
        upper, lower = (torch.sigmoid(_logit((difference + half) * deviation)) for half in (1 / 255, -1 / 255))
        probability = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
        nll = -probability.clamp(min=1e-12).log()
        return torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).mean((1, 2, 3)) / math.log(2)


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


def _logit(z: Tensor) -> Tensor:
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3))
