"""LMS, the linear multistep method of k-diffusion, as a StepProgram."""

from __future__ import annotations

import numpy as np

from diffkern.solvers.adams_bashforth import adams_bashforth
from diffkern.solvers.ddim import Clip
from diffkern.solvers.program import StepProgram
from diffkern.solvers.transitions import Process, Transitions


def lms(
    process: Process | Transitions, *, clip: Clip = (-1.0, 1.0), threshold: Clip = None, order: int = 4
) -> StepProgram:
    """One row for each step of `process`: Adams–Bashforth in ρ = σ/α with unequal steps (k-diffusion's `sample_lms`),

        x'/α' = x/α + Σ_j w_j·ε_j,   w_j = ∫ L_j(ρ) dρ over the step, exactly

    L_j being the Lagrange polynomials of the row's own ρ and the order − 1 before. The first rows have fewer. (Zhang &
    Chen 2023, arXiv 2204.13902, call it ρAB-DEIS.) No row adds noise.

    Raises ValueError for an order outside 1 to 4, and where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    return adams_bashforth(process, order, lambda rho: rho, np.ones_like, clip=clip, threshold=threshold)
