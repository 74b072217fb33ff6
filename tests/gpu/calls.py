"""One call of every differentiable op: its inputs by name, on the CPU in float64, and a function of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern.ops import group_norm, q_sample, solver_step
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import StepProgram, build

SHAPE = (3, 8, 6, 5)
PROCESS = GaussianProcess(linear_betas(1000))
TIMES = (0, 500, 999)


class OpCall(NamedTuple):
    inputs: dict[str, Tensor]
    function: Callable[..., Tensor]


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
        t = torch.tensor(TIMES, device=x0.device)
        return q_sample(x0, t, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod, **source)

    def stepped(x: Tensor, model_output: Tensor) -> Tensor:
        rows = torch.tensor(TIMES, device=x.device)
        return solver_step(x, model_output, program, rows, seed=2**63 + 5, samples=7)

    return {
        "group_norm": OpCall({"x": x + 3, **affine}, lambda x, **rest: group_norm(x, 4, **rest)),
        "group_norm, scale-shift, SiLU": OpCall(
            {"x": x + 3, **affine, **projection}, lambda x, **rest: group_norm(x, 4, activation="silu", **rest)
        ),
        "q_sample, noise given": OpCall({"x0": x, "noise": randn(*SHAPE, seed=5)}, noised),
        "q_sample, noise generated": OpCall({"x0": x}, lambda x0: noised(x0, seed=3, draw=2, samples=11)),
        "solver_step": OpCall({"x": x, "model_output": randn(*SHAPE, seed=6)}, stepped),
    }


CALLS = calls()
