"""A small diffusion and a network for it, the same in every test of a property."""

from __future__ import annotations

import copy

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
LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def diffusion(
    cls=GaussianDiffusion,
    *args,
    mean=ModelMeanType.EPSILON,
    variance=ModelVarType.LEARNED_RANGE,
    loss=LossType.MSE,
    **options,
):
    return cls(
        *args,
        betas=get_named_beta_schedule("cosine", STEPS),
        model_mean_type=mean,
        model_var_type=variance,
        loss_type=loss,
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


def images(seed=0, shape=SHAPE):
    """Grey levels, −1 and 1 among them, and t."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, shape, generator=generator) / 127.5 - 1
    x[:, 0].reshape(-1)[:2] = torch.tensor([-1.0, 1.0])
    return x, inputs()[1]


def network_for(d):
    return model if d.model_var_type in LEARNED else mean_model


def by_methods(d):
    """d, of which every loss and step is made of its methods."""
    d = copy.copy(d)
    d.p_mean_variance = d.p_mean_variance
    return d


def gradient_of(d, x0, t, noise, pick="loss"):
    """(the terms, the gradient of the sum of one of them by the network's output)."""
    leaves = []

    def network(x, t):
        leaves.append(network_for(d)(x, t).detach().requires_grad_())
        return leaves[0]

    terms = d.training_losses(network, x0, t, noise=noise)
    return terms, torch.autograd.grad(terms[pick].sum(), leaves[0])[0]
