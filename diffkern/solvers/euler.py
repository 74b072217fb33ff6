"""Euler's method, ancestral or with churn, as StepPrograms: Karras et al. 2022, arXiv 2206.00364."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.churn import NO_CHURN, Churn, bridge, churned, fold_noise, upwards
from diffkern.solvers.ddim import channels_of
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Transitions, transitions

Clip = tuple[float, float] | None


def euler(
    process: GaussianProcess | Transitions,
    *,
    clip: Clip = (-1.0, 1.0),
    threshold: Clip = None,
    churn: Churn = NO_CHURN,
    full: GaussianProcess | None = None,
) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0: algorithm 2 without its correction. Of the state
    y = x/α, whose noise is σ̂ = σ/α,

        y' = y + (σ̂' − σ̂)·(y − x0)/σ̂,   that is   x' = (σ'/σ)·x + (α' − α·σ'/σ)·x0

    where x0 is clipped first. This is DDIM with η = 0, whatever the scale of x is.

    With `churn`, noise comes in before each step in which it applies. Its place is in the row before, so that it costs
    no pass of its own; only for the first step there is one row more, which calls no network. See `churn.churned` for
    the levels that it leads to and for `full`. Of Transitions every row that leads to more noise is churn.

    Raises ValueError where x0 cannot be had from the prediction (eps at ᾱ = 0), and for s_churn above 0 with
    Transitions.
    """
    steps = churned(process, churn, full)
    named = steps.x0_columns()
    named["c_x"] = steps.sigma_next / steps.sigma
    named["c_0"] = steps.alpha_next - steps.alpha * named["c_x"]
    named, rows, calls = fold_noise(named, upwards(steps), *bridge(steps, churn.s_noise))
    return step_program(
        named, steps.times[rows], calls_network=calls, variance=channels_of(process), clip=clip, threshold=threshold
    )


def euler_ancestral(
    process: GaussianProcess | Transitions,
    *,
    clip: Clip = (-1.0, 1.0),
    threshold: Clip = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0: Euler's method to the level σ̂_down, and noise from there,

        σ̂_up² = η²·σ̂'²·(σ̂² − σ̂'²)/σ̂²,   σ̂_down² = σ̂'² − σ̂_up²,   y' = y + (σ̂_down − σ̂)·(y − x0)/σ̂ + σ̂_up·z

    (k-diffusion's sample_euler_ancestral; y = x/α, σ̂ = σ/α), x0 being clipped first. z is s_noise times unit normals.
    η = 0 is `euler`; for steps with σ² = 1 − α² this is DDIM with the same η, and η = 1 samples from the posterior.

    A step that leads to more noise has σ̂_up = 0.

    Raises ValueError for η outside [0, 1], a negative s_noise, and where x0 cannot be had from the prediction (eps at
    ᾱ = 0).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")
    if not 0 <= s_noise < np.inf:
        raise ValueError(f"s_noise is {s_noise}; it must be finite and at least 0")
    steps = transitions(process)
    ratio2 = (steps.sigma_next * steps.alpha / (steps.sigma * steps.alpha_next)) ** 2  # (σ̂'/σ̂)²
    renewed = np.maximum(eta**2 * (1.0 - ratio2), 0.0)  # what part of σ'² is fresh noise
    named = steps.x0_columns()
    named["c_x"] = steps.sigma_next * np.sqrt(1.0 - renewed) / steps.sigma
    named["c_0"] = steps.alpha_next - steps.alpha * named["c_x"]
    named["c_z"] = s_noise * steps.sigma_next * np.sqrt(renewed)
    return step_program(named, steps.times, variance=channels_of(process), clip=clip, threshold=threshold)
