"""What the Sampler is judged by, in float64: samplers as the papers print them, without StepPrograms, of some solvers,
and the tables that tests/solvers holds against papers and other libraries, executed in NumPy, of the others."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffkern.ops import philox_normal
from diffkern.process import GaussianProcess
from diffkern.solvers import SOLVERS, StepProgram
from tests.solvers.executor import execute, new_slots

PRINTED = ("ddpm", "ddim", "dpmpp_2m")
ONE_ROW = [name for name in SOLVERS if name not in ("plms", "pndm", "heun")]


def x_T(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return philox_normal((n, *shape), seed, stream=1).double()


def half_log_snr(abar: float) -> float:
    """λ = log(√ᾱ/√(1−ᾱ))."""
    return 0.5 * math.log(abar / (1 - abar))


def sample(
    output: Callable[[Tensor, int], Tensor],
    process: GaussianProcess,
    x: Tensor,
    seed: int,
    *,
    solver: str,
    clip: tuple[float, float] | None,
    eta: float = 0.0,
) -> list[tuple[Tensor, Tensor]]:
    """(x, x0) after each step; output(x, t) takes a timestep of the original process."""
    states = []
    before: tuple[Tensor, float] | None = None  # x0 and λ of the step before
    table = {name: value.tolist() for name, value in vars(process).items() if hasattr(value, "tolist")}
    for row, t in enumerate(reversed(range(process.num_timesteps))):
        abar, abar_prev = table["alphas_cumprod"][t], table["alphas_cumprod_prev"][t]
        out = output(x, table["timestep_map"][t])
        m, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
        x0 = {
            "x0": m,
            "eps": (x - (1 - abar) ** 0.5 * m) / abar**0.5,
            "v": abar**0.5 * x - (1 - abar) ** 0.5 * m,
        }[process.prediction]
        x0 = x0 if clip is None else x0.clamp(*clip)
        noise = philox_normal(tuple(x.shape), seed, draw=row, stream=2).double() if t else torch.zeros_like(x)
        if solver == "ddim":
            eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
            sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)) ** 0.5
            x = abar_prev**0.5 * x0 + max(1 - abar_prev - sigma**2, 0) ** 0.5 * eps + sigma * noise
        elif solver == "dpmpp_2m":
            data, here = x0, half_log_snr(abar)
            if t == 0:  # e^−h = 0
                x = x0
            else:
                h = half_log_snr(abar_prev) - here
                if before is not None:
                    r = (here - before[1]) / h
                    data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[0]
                x = ((1 - abar_prev) / (1 - abar)) ** 0.5 * x - abar_prev**0.5 * (math.exp(-h) - 1) * data
            before = x0, here
        else:
            mean = table["posterior_mean_coef1"][t] * x0 + table["posterior_mean_coef2"][t] * x
            if process.variance == "learned_range":
                low, high = table["posterior_log_variance_clipped"][t], torch.tensor(table["betas"][t]).double().log()
                std = torch.exp(0.5 * (low + (rest + 1) / 2 * (high - low)))
            else:
                std = table["model_variance"][t] ** 0.5
            x = mean + std * noise
        states.append((x, x0))
    return states


def run_table(
    output: Callable[[Tensor, float], Tensor], program: StepProgram, x: Tensor, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(x, x0) after each row that calls the network."""
    state, states = x.numpy(), []
    slots = new_slots(program, state)
    for row, time in enumerate(program.times):
        noise = (
            philox_normal(tuple(x.shape), seed, draw=row, stream=2).double().numpy() if program.makes_noise else None
        )
        calls = program.calls_network[row]
        out = output(torch.from_numpy(state), float(time)).numpy() if calls else np.zeros_like(state)
        step = execute(program, row, state, out, noise, slots)
        state = step.x
        if calls:
            states.append((torch.from_numpy(step.x), torch.from_numpy(step.x0)))
    return states


def tolerance(program: StepProgram) -> float:
    """What float32 may cost, relative: its rounding of a row's operands, times the sum of their weights' sizes.

    Extrapolation over unequal steps has weights of both signs, up to hundreds where the steps shrink fast.
    """
    names = ("c_x", "c_m", "c_0", *(f"c_h{k}" for k in range(program.num_slots)))
    return max(1e-5, 5e-6 * float(sum(np.abs(program.column(name)) for name in names).max()))
