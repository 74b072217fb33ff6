"""The losses and the bound in float64 as the papers write them: arXiv 2006.11239 eqs. 5–7 and 13, 2102.09672 eq. 15."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.integrations.guided_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType


def cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    upper, lower = (cdf((x - mean + edge) * torch.exp(-log_scale)) for edge in (1 / 255, -1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


class Exact:
    """What a network's output at x_t means, all in float64."""

    def __init__(self, d: GaussianDiffusion, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> None:
        self.d, self.t, self.x0, self.x_t = d, t, x0.double(), x_t.double()
        output = output.double()
        learned = d.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        self.network_mean = output[:, : x0.shape[1]]
        coef1, coef2 = self.at("posterior_mean_coef1"), self.at("posterior_mean_coef2")
        self.true_mean, self.true_log_variance = (
            coef1 * self.x0 + coef2 * self.x_t,
            self.at("posterior_log_variance_clipped"),
        )
        if d.model_mean_type == ModelMeanType.EPSILON:
            s = self.at("sqrt_alphas_cumprod")
            predicted = (self.x_t - self.at("sqrt_one_minus_alphas_cumprod") * self.network_mean) / s
        elif d.model_mean_type == ModelMeanType.START_X:
            predicted = self.network_mean
        else:
            predicted = (self.network_mean - coef2 * self.x_t) / coef1
        self.predicted = predicted.clamp(-1, 1) if clip else predicted
        previous = d.model_mean_type == ModelMeanType.PREVIOUS_X
        self.mean = self.network_mean if previous else coef1 * self.predicted + coef2 * self.x_t
        log_betas = torch.log(self.at("betas"))
        match d.model_var_type:
            case ModelVarType.FIXED_SMALL:
                self.log_variance = self.true_log_variance.expand(x0.shape)
            case ModelVarType.FIXED_LARGE:
                first = (t == 0).reshape(-1, *[1] * (x0.dim() - 1))
                self.log_variance = torch.where(first, self.true_log_variance, log_betas).expand(x0.shape)
            case ModelVarType.LEARNED:
                self.log_variance = output[:, x0.shape[1] :]
            case ModelVarType.LEARNED_RANGE:
                share = (output[:, x0.shape[1] :] + 1) / 2
                self.log_variance = share * log_betas + (1 - share) * self.true_log_variance
        assert learned == (output.shape[1] == 2 * x0.shape[1])

    def at(self, table: str) -> Tensor:
        return torch.tensor(getattr(self.d, table))[self.t].reshape(-1, *[1] * (self.x0.dim() - 1))

    def log_likelihood(self) -> Tensor:
        return log_likelihood(self.x0, self.mean, self.log_variance / 2)

    def vb(self) -> Tensor:
        kl = 0.5 * (
            self.log_variance
            - self.true_log_variance
            - 1
            + (self.true_log_variance.exp() + (self.true_mean - self.mean) ** 2) / self.log_variance.exp()
        )
        return torch.where(self.t == 0, -flat(self.log_likelihood()), flat(kl)) / math.log(2)

    def mse(self, noise: Tensor) -> Tensor:
        targets = {
            ModelMeanType.EPSILON: noise.double(),
            ModelMeanType.START_X: self.x0,
            ModelMeanType.PREVIOUS_X: self.true_mean,
        }
        return flat((targets[self.d.model_mean_type] - self.network_mean) ** 2)


def flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).mean(1)
