"""DPM-Solver++(2M) as a StepProgram: Lu et al. 2022, arXiv 2211.01095, algorithm 2."""

from __future__ import annotations

import numpy as np

from diffkern.solvers.ddim import Clip, channels_of
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Process, Transitions, transitions


def dpmpp_2m(process: Process | Transitions, *, clip: Clip = (-1.0, 1.0), threshold: Clip = None) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0. With α = √ᾱ, σ = √(1−ᾱ), λ = log(α/σ), the row for t is

        x_{t−1} = σ_{t−1}/σ_t·x_t + (α_{t−1} − α_t·σ_{t−1}/σ_t)·D,   D = x0 + (x0 − x0')/(2r)
        r = h_{t+1}/h_t,   h_t = λ_{t−1} − λ_t

    (the bracket is −α_{t−1}·(e^{−h_t} − 1)), where x0 is clipped and x0' is the row before's, which slot 0 remembers.
    Rows where 1/r is 0 or not finite are of first order, D = x0, steps of DDIM with η = 0: the first; the one after
    ᾱ = 0, since λ was −∞ there; and always the last, which leads to λ = ∞ and returns x0 (as diffusers'
    final_sigmas_type "zero"). No row adds noise, and of a network that learns its variance only the first C channels
    are used. Sample in fewer steps from a respaced process.

    Raises ValueError where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    steps = transitions(process)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = steps.log_snr_next - steps.log_snr
        weights = np.append(0.0, h[1:] / (2.0 * h[:-1]))  # 1/(2r)
    weights[~np.isfinite(weights)] = 0.0

    named = steps.x0_columns()
    named["c_x"] = steps.sigma_next / steps.sigma
    of_d = steps.alpha_next - steps.alpha * named["c_x"]
    named["c_0"] = of_d * (1.0 + weights)
    named["c_h0"] = -of_d * weights
    named["g0_0"] = np.ones(steps.num_rows)
    read_next = np.append(weights[1:], 0.0) != 0
    writes = np.stack([np.where(read_next, 0, -1), np.full(steps.num_rows, -1)], axis=1)
    return step_program(
        named, steps.times, writes=writes, num_slots=1, variance=channels_of(process), clip=clip, threshold=threshold
    )
