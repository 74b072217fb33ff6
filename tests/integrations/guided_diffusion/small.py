"""A small diffusion and a network for it, the same in every test of a property."""

from __future__ import annotations

import torch

from diffkern.integrations.guided_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)

SHAPE = (4, 3, 8, 8)
STEPS = 20


def diffusion(cls=GaussianDiffusion, *args, mean=ModelMeanType.EPSILON, variance=ModelVarType.LEARNED_RANGE, **options):
    return cls(
        *args,
        betas=get_named_beta_schedule("cosine", STEPS),
        model_mean_type=mean,
        model_var_type=variance,
        loss_type=LossType.MSE,
        **options,
    )


def model(x, t, **kwargs):
    """[mean; variance] of x, any function of both arguments."""
    time = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) / STEPS
    return torch.cat([torch.tanh(x + time), torch.sin(3 * x - time)], dim=1)


def mean_model(x, t, **kwargs):
    return model(x, t)[:, : x.shape[1]]


def inputs(seed=0, shape=SHAPE, t=(0, 1, 10, 19)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.tensor(t)


def seeded(function, *args, **kwargs):
    """function's result with torch's default generator at a fixed seed, and the generator's state after it."""
    torch.manual_seed(11)
    return function(*args, **kwargs), torch.get_rng_state()
