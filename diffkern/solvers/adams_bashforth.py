"""Linear multistep solvers in ρ = σ/α, whose ε is extrapolated by a polynomial: what LMS and DEIS have in common."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.ddim import Clip, channels_of
from diffkern.solvers.lagrange import lagrange_integrals
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Transitions, transitions

HIGHEST_ORDER = 4


def adams_bashforth(
    process: GaussianProcess | Transitions,
    order: int,
    coordinate: Callable[[np.ndarray], np.ndarray],
    density: Callable[[np.ndarray], np.ndarray],
    *,
    clip: Clip,
    threshold: Clip,
) -> StepProgram:
    """Rows x'/α' = x/α + Σ_j w_j·ε_j of the probability-flow ODE d(x/α)/dρ = ε, with w_j = ∫ L_j(u) dρ.

    The sum is over the row's own ε (j = 0) and those of up to order − 1 rows before, L_j their Lagrange polynomials in
    u = coordinate(ρ), whose dρ = density(u)·du, and the integral goes over the step. ε = (x − α·x0)/σ follows from the
    clipped x0. The first rows have fewer before them; one at α = 0, where ρ is infinite, counts for none; and where u
    is infinite at the end of a step, that is of first order.

    Slot i mod (order − 1) receives row i's ε.
    """
    if order not in range(1, HIGHEST_ORDER + 1):
        raise ValueError(f"order is {order!r}; it must be an int in [1, {HIGHEST_ORDER}]")
    steps = transitions(process)
    rows, slots = steps.num_rows, order - 1
    with np.errstate(divide="ignore"):
        rho, rho_next = steps.sigma / steps.alpha, steps.sigma_next / steps.alpha_next
        u, u_next = coordinate(rho), coordinate(rho_next)
    first = int(np.argmax(np.isfinite(rho)))  # ρ falls: only the first rows can have it infinite

    named = steps.x0_columns()
    # Where all of ε is the row's own: DDIM, in the form that α = 0 does not break.
    c_x = steps.sigma_next / steps.sigma
    named["c_0"] = steps.alpha_next - c_x * steps.alpha
    history = np.zeros((rows, slots))
    is_read = np.zeros(rows, dtype=bool)
    for i in range(rows):
        known = min(order, i - first + 1)
        if known > 1 and np.isfinite(u_next[i]):
            # w of ε_i, ε_{i−1}, …
            weights = lagrange_integrals(u[i - known + 1 : i + 1][::-1].tolist(), u[i], u_next[i], density)
            for j, weight in enumerate(weights[1:], start=1):
                history[i, (i - j) % slots] = steps.alpha_next[i] * weight
                is_read[i - j] = True
            c_x[i] = steps.alpha_next[i] * (1 / steps.alpha[i] + weights[0] / steps.sigma[i])
            named["c_0"][i] = -steps.alpha_next[i] * weights[0] / rho[i]
    named["c_x"] = c_x
    writes = np.full((rows, 2), -1)
    if slots:
        named |= {f"c_h{k}": history[:, k] for k in range(slots)}
        named["g0_x"] = 1 / steps.sigma
        named["g0_0"] = -steps.alpha / steps.sigma
        writes[:, 0] = np.where(is_read, np.arange(rows) % slots, -1)
    return step_program(
        named,
        steps.times,
        writes=writes,
        num_slots=slots,
        variance=channels_of(process),
        clip=clip,
        threshold=threshold,
    )
