"""Sampling with the analytic variance: few ancestral steps keep the spread of the data."""

import numpy as np
import pytest
import torch

from diffkern import Sampler
from diffkern.process import GaussianProcess, linear_betas

VARIANCE = 0.09  # of the data, N(0, VARIANCE) in every pixel


def best_network(process):
    """ε̂ = E[ε | x_t] for such data, and the mean square of it at each timestep."""
    noise = 1 - process.alphas_cumprod
    total = process.alphas_cumprod * VARIANCE + noise
    slope = torch.tensor(np.sqrt(noise) / total, dtype=torch.float32)
    return lambda x, t: slope[t][:, None, None, None] * x, noise / total


@pytest.mark.parametrize("steps", [5, 50])
def test_ancestral_steps_keep_the_variance_of_gaussian_data(steps):
    """Their reverse steps are Gaussian, of the analytic variance: exact in any number of steps, as no other is."""
    process = GaussianProcess(linear_betas(1000))
    network, mean_squares = best_network(process)
    found = {}
    for variance in ("fixed_small", "fixed_large", "analytic"):
        chosen = GaussianProcess(
            process.betas, variance=variance, eps_mean_square=mean_squares if variance == "analytic" else None
        )
        images = Sampler(network, chosen, (1, 16, 16), solver="ddpm", steps=steps, clip=None).sample(64, seed=1)
        found[variance] = images.double().square().mean().item()
    scatter = VARIANCE * np.sqrt(2 / (64 * 16 * 16))
    assert abs(found["analytic"] - VARIANCE) < 4 * scatter
    assert found["fixed_small"] < VARIANCE - 20 * scatter
    assert found["fixed_large"] > VARIANCE + 10 * scatter
