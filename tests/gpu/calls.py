"""Calls of the ops that take tensors: their inputs by name, on the CPU in float64, and a function of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.ops import (
    attention,
    attention_qkv,
    channel_rms_norm,
    diffusion_loss,
    diffusion_loss_and_grad,
    group_norm,
    linear_attention,
    q_sample,
    solver_step,
    vb_terms,
)
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import StepProgram, build

SHAPE = (3, 8, 6, 5)
PROCESS = GaussianProcess(linear_betas(1000))
TIMES = (0, 500, 999)


class OpCall(NamedTuple):
    inputs: dict[str, Tensor]
    function: Callable[..., Tensor]
    differentiable: bool = True


@functools.cache
def times(device: torch.device) -> Tensor:
    """The samples' timesteps there, copied once: a CUDA graph captures no copy from the host."""
    return torch.tensor(TIMES, device=device)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ddpm() -> StepProgram:
    return build("ddpm", PROCESS, clip=(-1.0, 1.0))


def calls() -> dict[str, OpCall]:
    x = randn(*SHAPE, seed=0)
    affine = {"weight": randn(8, seed=1), "bias": randn(8, seed=2)}
    projection = {"scale": randn(3, 8, seed=3), "shift": randn(3, 8, seed=4)}
    program = ddpm()

    def noised(x0: Tensor, **source: Tensor | int) -> Tensor:
        tables = PROCESS.tables(x0.device)
        t = times(x0.device)
        return q_sample(x0, t, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod, **source)

    def stepped(x: Tensor, model_output: Tensor) -> Tensor:
        rows = times(x.device)
        return solver_step(x, model_output, program, rows, seed=2**63 + 5, samples=7)

    def loss(model_output: Tensor, x0: Tensor, **rest: Any) -> Tensor:
        t = times(x0.device)
        return diffusion_loss(model_output, x0, t, PROCESS.tables(x0.device), **rest)

    def loss_gradient(model_output: Tensor, x0: Tensor, **rest: Any) -> Tensor:
        t = times(x0.device)
        return diffusion_loss_and_grad(model_output, x0, t, PROCESS.tables(x0.device), scale=0.5, **rest)[1]

    def bound(model_output: Tensor, x0: Tensor, **rest: Any) -> Tensor:
        t = times(x0.device)
        return vb_terms(model_output, x0, t, PROCESS.tables(x0.device), **rest).vb

    output, noise = {"model_output": randn(*SHAPE, seed=7)}, {"noise": randn(*SHAPE, seed=8)}
    counter = {"seed": 3, "draw": 2, "samples": 11}

    return {
        "group_norm": OpCall({"x": x + 3, **affine}, lambda x, **rest: group_norm(x, 4, **rest)),
        "group_norm, scale-shift, SiLU": OpCall(
            {"x": x + 3, **affine, **projection}, lambda x, **rest: group_norm(x, 4, activation="silu", **rest)
        ),
        "channel_rms_norm, scale-shift, SiLU": OpCall(
            {"x": x, "weight": affine["weight"], **projection},
            lambda x, **rest: channel_rms_norm(x, activation="silu", **rest),
        ),
        "attention, packed": OpCall(
            {"qkv": randn(4, 96, 50, seed=10)}, lambda qkv: attention_qkv(qkv, 2, order="qkvhc")
        ),
        "attention, more keys, in pieces": OpCall(
            {"q": randn(2, 70, 64, seed=11), "k": randn(2, 300, 64, seed=12), "v": randn(2, 300, 64, seed=13)},
            lambda q, k, v: attention(q, k, v, 4),
        ),
        "linear_attention, memory": OpCall(
            {"qkv": randn(2, 3 * 4 * 32, 150, seed=9), "memory": randn(2, 4, 32, 4, seed=10)},
            lambda qkv, memory: linear_attention(qkv, 4, memory=memory),
        ),
        "q_sample, noise given": OpCall({"x0": x, "noise": randn(*SHAPE, seed=5)}, noised),
        "q_sample, noise generated": OpCall({"x0": x}, lambda x0: noised(x0, seed=3, draw=2, samples=11)),
        "solver_step": OpCall({"x": x, "model_output": randn(*SHAPE, seed=6)}, stepped),
        "diffusion_loss, eps given": OpCall(
            {**output, **noise}, lambda model_output, noise: loss(model_output, torch.zeros_like(noise), noise=noise)
        ),
        "diffusion_loss, x0": OpCall({**output, "x0": x}, lambda **rest: loss(target="x0", **rest)),
        "diffusion_loss, v generated": OpCall({**output, "x0": x}, lambda **rest: loss(target="v", **counter, **rest)),
        "diffusion_loss_and_grad, v given": OpCall(
            {**output, "x0": x, **noise}, lambda **rest: loss_gradient(target="v", **rest), differentiable=False
        ),
        "diffusion_loss_and_grad, v generated": OpCall(
            {**output, "x0": x}, lambda **rest: loss_gradient(target="v", **counter, **rest), differentiable=False
        ),
        "vb_terms, v generated": OpCall(
            {**output, "x0": x}, lambda **rest: bound(target="v", variance="fixed_large", **counter, **rest)
        ),
        "vb_terms, eps given, clipped, exact": OpCall(
            {**output, "x0": x, **noise},
            lambda **rest: bound(variance="fixed_small", clip=(-1.0, 1.0), decoder="exact", **rest),
        ),
        "diffusion_loss_and_grad, hybrid": OpCall(
            {"model_output": randn(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], seed=9), "x0": x, **noise},
            lambda **rest: loss_gradient(loss="hybrid", variance="learned_range", **rest),
            differentiable=False,
        ),
    }


CALLS = calls()
