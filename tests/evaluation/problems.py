"""One-dimensional problems whose best denoiser, likelihood and bound are known, and their data."""

import time

import numpy as np
import torch
from torch import nn

GRID = np.linspace(-1, 1, 17)
_PROBABILITIES = np.random.default_rng(3).dirichlet(np.full(17, 0.5))


class GridDenoiser(nn.Module):
    """E[x0 | x_t] for independent pixels on 17 grey levels with probabilities p, by the sum over the levels; float64.

    It is given t and so must know the process; `scale` < 1 makes it a worse network than the best one.
    """

    def __init__(self, process, scale=1.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("s", torch.tensor(process.sqrt_alphas_cumprod))
        self.register_buffer("sigma", torch.tensor(process.sqrt_one_minus_alphas_cumprod))
        self.index = {float(time): t for t, time in enumerate(process.timestep_map)}

    def forward(self, x, times):
        t = torch.tensor([self.index[time] for time in times.tolist()])
        return (self.scale * self.mean(x.double(), t)).float()

    def mean(self, x, t):
        """E[x0 | x_t] for x (N, …) and t (N,), float64."""
        s, sigma = (table[t].reshape(-1, *[1] * x.ndim) for table in (self.s, self.sigma))
        levels = torch.tensor(GRID)
        logits = torch.tensor(_PROBABILITIES).log() - 0.5 * ((x[..., None] - s * levels) / sigma) ** 2
        return torch.softmax(logits, dim=-1) @ levels


def grid_images(count, seed=0, shape=(1, 4, 4)):
    """float32 (count, *shape)."""
    values = np.random.default_rng(seed).choice(GRID, size=(count, *shape), p=_PROBABILITIES)
    return torch.tensor(values, dtype=torch.float32)


def grid_entropy():
    """E[−log2 p] of a pixel."""
    return -(_PROBABILITIES * np.log2(_PROBABILITIES)).sum()


def grid_bits(images):
    """−log2 p of each image a pixel: what the bound is a bound of."""
    index = np.round((images.double().numpy() + 1) * 8).astype(int)
    return -np.log2(_PROBABILITIES)[index].mean(axis=(1, 2, 3))


def grid_bound(process, scale=1.0, points=801):
    """E of every term over data and noise, by integrals over ε alone: decoder and KL in float64, (T,) bits/dim."""
    from scipy.special import log_ndtr

    net = GridDenoiser(process, scale)
    eps = np.linspace(-7, 7, points)
    density = np.exp(-0.5 * eps**2) / np.sqrt(2 * np.pi) * (eps[1] - eps[0])
    terms = np.empty(process.num_timesteps)
    for t in range(process.num_timesteps):
        s, sigma = process.sqrt_alphas_cumprod[t], process.sqrt_one_minus_alphas_cumprod[t]
        x = s * GRID[:, None] + sigma * eps
        guess = scale * net.mean(torch.tensor(x)[None], torch.tensor([t]))[0].numpy()
        log_variance = process.model_log_variance[t]
        if t == 0:
            deviation = np.exp(0.5 * log_variance)
            upper = np.where(GRID[:, None] > 0.99, np.inf, (GRID[:, None] + 1 / 16 - guess) / deviation)
            lower = np.where(GRID[:, None] < -0.99, -np.inf, (GRID[:, None] - 1 / 16 - guess) / deviation)
            # log(Φ(b) − Φ(a)), from the side where both are small.
            swap = lower > 0
            a, b = np.where(swap, -upper, lower), np.where(swap, -lower, upper)
            nats = -(log_ndtr(b) + np.log1p(-np.exp(log_ndtr(a) - log_ndtr(b))))
        else:
            difference = process.posterior_mean_coef1[t] * (GRID[:, None] - guess)
            delta = log_variance - process.posterior_log_variance_clipped[t]
            nats = 0.5 * (delta + np.expm1(-delta) + difference**2 * np.exp(-log_variance))
        terms[t] = _PROBABILITIES @ (nats @ density) / np.log(2)
    return terms


DEVIATION = 0.2  # five of them reach the ends of [−1, 1]


class GaussianDenoiser(nn.Module):
    """E[x0 | x_t] for x0 ~ N(0, DEVIATION²·I), as the process's prediction; waits `delay` seconds a call."""

    def __init__(self, process, delay=0.0):
        super().__init__()
        self.process, self.delay = process, delay
        self.calls = 0

    def forward(self, x, t):
        time.sleep(self.delay)
        self.calls += 1
        x, t = x.double().numpy(), t.numpy()
        s, sigma = self.process.sqrt_alphas_cumprod[t], self.process.sqrt_one_minus_alphas_cumprod[t]
        x0 = (s * DEVIATION**2 / (s**2 * DEVIATION**2 + sigma**2)).reshape(-1, 1, 1, 1) * x
        return torch.tensor(self.process.convert(x, x0, t, "x0", self.process.prediction), dtype=torch.float32)


def gaussian_images(count, levels, seed=0, shape=(1, 4, 4)):
    half = (levels - 1) / 2
    values = np.random.default_rng(seed).normal(0, DEVIATION, size=(count, *shape))
    return torch.tensor(np.round(values.clip(-1, 1) * half) / half, dtype=torch.float32)


def gaussian_mean_squares(process):
    """E[ε̂²]: ε̂ = σ·x_t/(s²·v + σ²), and s²·v + σ² is the variance of x_t."""
    noise = 1 - process.alphas_cumprod
    return noise / (process.alphas_cumprod * DEVIATION**2 + noise)


def gaussian_bits(process, levels):
    """What the bound is with the best mean and variance, bits/dim.

    Every reverse step is then the true one, p(x_{t−1} | x_t) = q(x_{t−1} | x_t), and all that is lost is that x_T is
    not quite N(0, 1): E[−log2 p(x0)] for bins so narrow that p is constant in them, and KL(q(x_T) ‖ N(0, 1)).
    """
    bins = 0.5 * np.log2(2 * np.pi * np.e * DEVIATION**2) + np.log2((levels - 1) / 2)
    variance = 1 - process.alphas_cumprod[-1] * (1 - DEVIATION**2)
    return bins + 0.5 * (variance - 1 - np.log(variance)) / np.log(2)
