"""DEIS as a StepProgram: Zhang & Chen 2023, arXiv 2204.13902."""

from __future__ import annotations

import numpy as np

from diffkern.solvers.adams_bashforth import adams_bashforth
from diffkern.solvers.ddim import Clip
from diffkern.solvers.program import StepProgram
from diffkern.solvers.transitions import Process, Transitions


def deis(
    process: Process | Transitions, *, clip: Clip = (-1.0, 1.0), threshold: Clip = None, order: int = 3
) -> StepProgram:
    """One row for each step of `process`: the diffusion exponential integrator, eqs. 14 and 15, in ρ = σ/α,

        x'/α' = x/α + Σ_j w_j·ε_j,   w_j = ∫ L_j(log ρ) dρ over the step

    L_j being the Lagrange polynomials of the row's own log ρ and the order − 1 before: `order` points, the paper's
    tAB-(order − 1) with its polynomials in log ρ instead of t (diffusers' "logrho"). The first rows have fewer; the
    last, which leads to ρ = 0, has its own alone and returns x0. No row adds noise.

    Raises ValueError for an order outside 1 to 4, and where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    return adams_bashforth(process, order, np.log, np.exp, clip=clip, threshold=threshold)
