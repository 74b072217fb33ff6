"""DDIM as a StepProgram: Song et al. 2021, arXiv 2010.02502."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.prediction import x0_columns
from diffkern.solvers.program import StepProgram, step_program


def ddim(process: GaussianProcess, *, clip: tuple[float, float] | None = (-1.0, 1.0), eta: float = 0.0) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0; the row for t is eq. 12,

        x_{t−1} = √ᾱ_{t−1}·x0 + √(1 − ᾱ_{t−1} − σ²)·ε + σ·z,   σ = η·√β̃_t,   ε = (x_t − √ᾱ_t·x0)/√(1−ᾱ_t)

    where x0 is clipped first and ε follows from the clipped one, as in OpenAI's code. η = 0 is deterministic, η = 1
    ancestral. Of a network that learns its variance only the first C channels are used. Sample in fewer steps from a
    respaced process.

    Raises ValueError for an η outside [0, 1], and where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")
    noise = 1.0 - process.alphas_cumprod
    # 1 − ᾱ_{t−1} − σ² as a product: the difference can come out below 0 where it should be 0.
    direction = np.sqrt((1.0 - process.alphas_cumprod_prev) * np.maximum(1.0 - eta**2 * process.betas / noise, 0.0))
    of_x = direction / process.sqrt_one_minus_alphas_cumprod

    named = x0_columns(process)
    named["c_x"] = of_x[::-1]
    named["c_0"] = (np.sqrt(process.alphas_cumprod_prev) - of_x * process.sqrt_alphas_cumprod)[::-1]
    named["c_z"] = eta * np.sqrt(process.posterior_variance[::-1])
    # Bounds of 0 on the log-variance leave σ = 1, whatever the network's variance channels say.
    variance = "learned_range" if process.variance == "learned_range" else "fixed"
    return step_program(named, process.timestep_map[::-1], variance=variance, clip=clip)
