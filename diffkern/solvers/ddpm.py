"""Ancestral sampling (DDPM) as a StepProgram: Ho et al. 2020, arXiv 2006.11239, algorithm 2."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.prediction import x0_columns
from diffkern.solvers.program import StepProgram, step_program


def ddpm(process: GaussianProcess, *, clip: tuple[float, float] | None = (-1.0, 1.0)) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0; the row for t samples from the posterior

        x_{t−1} ~ N(coef1_t·x0 + coef2_t·x_t, σ_t²·I),  x0 as the network predicts it, clipped to `clip`

    with the process's variance: fixed, or interpolated by the network between log β̃_t and log β_t. The last row adds
    no noise. Sample in fewer steps from a respaced process.

    Raises ValueError where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    named = x0_columns(process)
    named["c_0"] = process.posterior_mean_coef1[::-1]
    named["c_x"] = process.posterior_mean_coef2[::-1]
    if process.model_variance is None:
        std = np.ones(process.num_timesteps)
        named["log_var_min"] = process.posterior_log_variance_clipped[::-1]
        named["log_var_max"] = np.log(process.betas[::-1])
    else:
        std = np.sqrt(process.model_variance[::-1])
    named["c_z"] = np.append(std[:-1], 0.0)
    variance = "learned_range" if process.variance == "learned_range" else "fixed"
    return step_program(named, process.timestep_map[::-1], variance=variance, clip=clip)
