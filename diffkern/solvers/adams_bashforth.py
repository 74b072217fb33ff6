"""Linear multistep solvers in ρ = σ/α, whose ε is extrapolated by a polynomial: what LMS and DEIS have in common."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffkern.solvers.churn import eps_columns
from diffkern.solvers.ddim import Clip, channels_of
from diffkern.solvers.lagrange import lagrange_integrals
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Process, Transitions, transitions

HIGHEST_ORDER = 4


def adams_bashforth(
    process: Process | Transitions,
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

    eps_x, eps_m, eps_0 = eps_columns(steps, clip is not None or threshold is not None)
    # x' = of_x·x + of_0·x0 + of_eps·ε + …: α'·x0 + σ'·ε, a step of DDIM, where the row has nothing but its own ε.
    of_x, of_0, of_eps = np.zeros(rows), steps.alpha_next.copy(), steps.sigma_next.copy()
    history = np.zeros((rows, slots))
    is_read = np.zeros(rows, dtype=bool)
    for i in range(rows):
        known = min(order, i - first + 1)
        if known > 1 and np.isfinite(u_next[i]):
            nodes = u[i - known + 1 : i + 1][::-1]
            own, *earlier = steps.alpha_next[i] * lagrange_integrals(nodes.tolist(), u[i], u_next[i], density)
            of_x[i], of_0[i], of_eps[i] = steps.alpha_next[i] / steps.alpha[i], 0.0, own
            for j, weight in enumerate(earlier, start=1):
                history[i, (i - j) % slots] = weight
                is_read[i - j] = True
    named = steps.x0_columns()
    named |= {"c_x": of_x + of_eps * eps_x, "c_m": of_eps * eps_m, "c_0": of_0 + of_eps * eps_0}
    writes = np.full((rows, 2), -1)
    if slots:
        named |= {f"c_h{k}": history[:, k] for k in range(slots)}
        named |= {"g0_x": eps_x, "g0_m": eps_m, "g0_0": eps_0}
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
