"""Heun's method, Karras et al. 2022 (EDM), arXiv 2206.00364, algorithm 2, as a StepProgram."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.churn import NO_CHURN, Churn, bridge, churned, eps_columns, fold_noise, upwards
from diffkern.solvers.ddim import channels_of
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Transitions

Clip = tuple[float, float] | None


def heun(
    process: GaussianProcess | Transitions,
    *,
    clip: Clip = (-1.0, 1.0),
    threshold: Clip = None,
    churn: Churn = NO_CHURN,
    full: GaussianProcess | None = None,
) -> StepProgram:
    """Two rows for each step of `process`, from t = T−1 to 0, and one for the last. Of y = x/α, whose noise is σ̂ = σ/α
    and whose derivative is dy/dσ̂ = (y − x0)/σ̂ = ε, the first is Euler's and the second corrects it:

        y' = y + (σ̂' − σ̂)·ε(y, σ̂)
        y″ = y + (σ̂' − σ̂)·(ε(y, σ̂) + ε(y', σ̂'))/2

    Slot 0 remembers y + (σ̂' − σ̂)·ε(y, σ̂)/2, at the scale of x'. ε follows from the clipped x0. Steps that lead to
    σ = 0, or from α = 0, where σ̂ is infinite, and the last are Euler's.

    `churn` and `full`: as of `euler`. Transitions must follow each other, as those of `chain` do.

    Raises ValueError if they do not, where x0 cannot be had from the prediction (eps at ᾱ = 0), and for s_churn above
    0 with Transitions.
    """
    steps = churned(process, churn, full)
    steps.check_chain()
    up = upwards(steps)
    twice = ~up & (steps.alpha > 0) & (steps.sigma_next > 0)
    twice[-1] = False  # what the network predicts is not known at the level where the chain ends

    step = np.repeat(np.arange(steps.num_rows), 1 + twice)  # the step that each row belongs to
    second = np.append(False, step[1:] == step[:-1])
    first = twice[step] & ~second
    level = step + second  # where the row's network is called
    scale, noise = bridge(steps, churn.s_noise)
    scale[~(twice | up)] = 0.0  # infinite from α = 0
    half = np.where(twice, (steps.sigma_next - scale * steps.sigma) / 2, 0.0)[step]
    of_x, of_m, of_x0 = (column[level] for column in eps_columns(steps, clip is not None or threshold is not None))

    c_x = (steps.sigma_next / steps.sigma)[step]
    c_0 = (steps.alpha_next - steps.alpha * steps.sigma_next / steps.sigma)[step]
    named = {
        "a_x": steps.a_x[level],
        "a_m": steps.a_m[level],
        "c_x": np.where(second, half * of_x, c_x),
        "c_m": np.where(second, half * of_m, 0.0),
        "c_0": np.where(second, half * of_x0, c_0),
        "c_h0": second.astype(float),
        "g0_x": np.where(first, scale[step] + half * of_x, 0.0),
        "g0_m": np.where(first, half * of_m, 0.0),
        "g0_0": np.where(first, half * of_x0, 0.0),
    }
    named, rows, calls = fold_noise(named, up[step], scale[step], noise[step])
    writes = np.stack([np.where(first[rows], 0, -1), np.full(len(rows), -1)], axis=1)
    return step_program(
        named,
        steps.times[level[rows]],
        calls_network=calls,
        writes=writes,
        num_slots=1,
        variance=channels_of(process),
        clip=clip,
        threshold=threshold,
    )
