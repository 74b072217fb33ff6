"""Parts that the stand-ins for guided-diffusion and improved-diffusion share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def conv_nd(dims, *args, **kwargs):
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims, *args, **kwargs):
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def zero_module(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm32(nn.GroupNorm):
    """Normalises in float32 whatever the dtype of x, and returns that dtype."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def normalization(channels):
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps, dim, max_period=10000):
    """(N,) → (N, dim): cosines, then sines, of t · max_period^(−i / (dim/2)); a zero column where dim is odd."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class CheckpointFunction(torch.autograd.Function):
    """Runs without a graph in the forward pass, and once more with one in the backward pass."""

    @staticmethod
    def forward(ctx, function, num_inputs, *tensors):
        ctx.function, ctx.num_inputs, ctx.tensors = function, num_inputs, tensors
        with torch.no_grad():
            return function(*tensors[:num_inputs])

    @staticmethod
    def backward(ctx, grad_output):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.tensors[: ctx.num_inputs]]
        with torch.enable_grad():
            output = ctx.function(*(tensor.view_as(tensor) for tensor in inputs))
        parameters = ctx.tensors[ctx.num_inputs :]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grads = torch.autograd.grad(output, [*inputs, *trained], grad_output, allow_unused=True)
        of_trained = iter(grads[len(inputs) :])
        of_parameters = (next(of_trained) if parameter.requires_grad else None for parameter in parameters)
        return None, None, *grads[: len(inputs)], *of_parameters


def checkpoint(func, inputs, params, flag):
    return CheckpointFunction.apply(func, len(inputs), *inputs, *params) if flag else func(*inputs)
