"""Ancestral sampling (DDPM) as a StepProgram: Ho et al. 2020, arXiv 2006.11239, algorithm 2."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Transitions, transitions

Clip = tuple[float, float] | None


def ddpm(
    process: GaussianProcess, *, clip: Clip = (-1.0, 1.0), threshold: Clip = None, classifier: bool = False
) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0; the row for t samples from the posterior

        x_{t−1} ~ N(coef1_t·x0 + coef2_t·x_t, σ_t²·I),  x0 as the network predicts it, clipped to `clip`

    with the process's variance: fixed, or the network's own: "learned", its further channels are log σ², or
    "learned_range", they interpolate between log β̃_t and log β_t. The last row adds no noise. A network that predicts
    x_prev gives the mean itself, which no clipping of x0 changes. Sample in fewer steps from a respaced process.

    With `classifier` the rows read e, the gradient of a classifier's log p(y | x_t), and the mean gains σ_t²·e
    (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 1).

    Raises ValueError where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    named = {**transitions(process).x0_columns()}
    if process.prediction == "x_prev":
        named["c_m"] = np.ones(process.num_timesteps)
    else:
        named["c_0"] = process.posterior_mean_coef1[::-1]
        named["c_x"] = process.posterior_mean_coef2[::-1]
    if process.model_variance is None:
        std = np.ones(process.num_timesteps)
        if classifier:
            named["c_v"] = std
        if process.variance == "learned_range":
            named["log_var_min"] = process.posterior_log_variance_clipped[::-1]
            named["log_var_max"] = np.log(process.betas[::-1])
    else:
        std = np.sqrt(process.model_variance[::-1])
        if classifier:
            named["c_e"] = process.model_variance[::-1]
    named["c_z"] = np.append(std[:-1], 0.0)
    return step_program(
        named, process.timestep_map[::-1], variance=process.channel_variance, clip=clip, threshold=threshold
    )


def posterior(steps: Transitions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(c_0, c_x, β̃, β), float64 (R,), of steps in which x = α·x0 + σ·ε has σ² = 1 − α² before and after.

    β = 1 − α²/α'² is the variance of the step as one of the forward process, N(c_0·x0 + c_x·x, β̃·I) its posterior
    (Ho et al. 2020, eq. 7).
    """
    ratio = steps.alpha / steps.alpha_next
    beta = 1.0 - ratio**2
    noise, noise_next = steps.sigma**2, steps.sigma_next**2
    return steps.alpha_next * beta / noise, ratio * noise_next / noise, noise_next / noise * beta, beta
