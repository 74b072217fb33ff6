"""DPM-Solver and DPM-Solver++ multistep as StepPrograms, orders 1 to 3, of the ODE and of the SDE.

Lu et al. 2022, arXiv 2206.00927 (DPM-Solver) and arXiv 2211.01095 (DPM-Solver++).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from diffkern.process import GaussianProcess
from diffkern.solvers.ddim import channels_of
from diffkern.solvers.exponential import phi
from diffkern.solvers.history import before, ring_reads, ring_writes, step_lengths, usable_orders
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Transitions, transitions

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
SOLVER_TYPES = ("midpoint", "heun")
THIRD = ("taylor", "lu", "diffusers")
Pair = tuple[float, float] | None


def dpm_multistep(
    process: GaussianProcess | Transitions,
    *,
    algorithm: str = "dpmsolver++",
    orders: ArrayLike = 2,
    solver_type: str = "midpoint",
    third: str = "taylor",
    clip: Pair = (-1.0, 1.0),
    threshold: Pair = None,
    history: int | None = None,
) -> StepProgram:
    """One row for each step of `process`, a chain, from (α, σ) to (α', σ'). With λ = log(α/σ) and h = λ' − λ, a row is

        x' = c_x·x + P·(z·φ_1·D0 + z·φ_2·D1 + z·φ_3·w·D2) + s·noise,    φ_k = φ_k(z) = Σ_n z^n/(n+k)!

        algorithm           z     P     c_x           s               D0
        "dpmsolver++"       −h    −α'   σ'/σ          0               x0
        "dpmsolver"         h     −σ'   α'/α          0               ε
        "sde-dpmsolver++"   −2h   −α'   σ'/σ·e^(−h)   σ'·√(1−e^−2h)   x0
        "sde-dpmsolver"     h     −2σ'  α'/α          σ'·√(e^2h−1)    ε

    where D1 = h·dD0/dλ and D2 = h²/2·d²D0/dλ² come from m0 = D0 and from what the rows before remembered of theirs, m1
    and m2, which lie h1 and h1 + h2 back:

        order 1   D1 = D2 = 0
        order 2   D1 = h·(m0 − m1)/h1, D2 = 0; with solver_type "midpoint" φ_1/2 stands in the place of φ_2
        order 3   D1 = a + h1·d, D2 = h·d   with a = h·(m0 − m1)/h1, d = (a − h·(m1 − m2)/h2)/(h1 + h2)

    (arXiv 2206.00927, proposition 3.1 and appendix B; arXiv 2211.01095, section 4, algorithm 2 and appendix B.)

    `orders`: int, or ints (R,), 1 to 3. A row is of a lower order where its own step or one that it looks back on is
    not there, infinite (λ = ±∞: α = 0 or σ = 0) or of length 0.
    `third`: w of order 3. "taylor" is 2, as the expansion has it; "lu" is 1, as in the authors' published code and
    those that follow it, which makes it of second order; "diffusers" is "lu" except for "sde-dpmsolver++", where one
    sign differs in diffusers' code: z·φ_3 + 1 stands in the place of z·φ_3.
    x0 is clipped to `clip`, or thresholded (ratio, max); ε follows from it then.
    `history`: the number of slots; row i writes its D0 to slot i mod history. None: max(orders) − 1, written
    only where a row will read them. With max(orders) of them no row overwrites what it reads itself.

    Raises ValueError for names and orders that are none of these, where x0 or ε cannot be had from the prediction, for
    steps from α = 0 by the ε algorithms, and for a step to σ = 0 by "sde-dpmsolver".
    """
    for name, value, known in (
        ("algorithm", algorithm, ALGORITHMS),
        ("solver_type", solver_type, SOLVER_TYPES),
        ("third", third, THIRD),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it may be one of {', '.join(map(repr, known))}")
    steps = transitions(process)
    h = step_lengths(steps)
    order = usable_orders(orders, h, most=3)
    named = steps.x0_columns()
    c_x, of_d0, named["c_z"] = _first_order(steps, h, algorithm)
    of_d1, of_d2 = _higher_orders(steps, h, algorithm, solver_type, order, third)

    h1, h2 = before(h, 1), before(h, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_d = np.where(order > 2, (of_d1 * h1 + of_d2 * h) / (h1 + h2), 0.0)
        second = np.where(order > 2, of_d * h / h2, 0.0)
        first = np.where(order > 1, (of_d1 + of_d) * h / h1, 0.0)
    newest = newest_columns(steps, algorithm.endswith("++"), clip is not None or threshold is not None)
    for name, column in newest.items():
        named[f"c_{name}"] = (of_d0 + first) * column
        named[f"g0_{name}"] = column
    named["c_x"] = named.get("c_x", 0.0) + c_x
    of_m = {1: -first - second, 2: second}
    slots = int(np.max(orders)) - 1 if history is None else history
    named |= ring_reads(of_m, slots)
    writes = ring_writes(of_m, slots, every_row=history is not None)
    return step_program(
        named,
        steps.times,
        writes=np.stack([writes, np.full(steps.num_rows, -1)], axis=1),
        num_slots=slots,
        variance=channels_of(process),
        clip=clip,
        threshold=threshold,
    )


def newest_columns(steps: Transitions, data: bool, clipped: bool) -> dict[str, np.ndarray]:
    """What the network says at a row, x0 if `data` or else ε, as coefficients of x, m and x0 ("0")."""
    if data:
        return {"0": np.ones(steps.num_rows)}
    if clipped:
        return {"x": 1.0 / steps.sigma, "0": -steps.alpha / steps.sigma}
    return {"x": steps.e_x, "m": steps.e_m}


def _first_order(steps: Transitions, h: np.ndarray, algorithm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c_x, the coefficient of D0 and the noise's, (R,) each."""
    ratio, none = steps.sigma_next / steps.sigma, np.zeros(steps.num_rows)
    match algorithm:
        case "dpmsolver++":
            return ratio, steps.alpha_next - steps.alpha * ratio, none
        case "sde-dpmsolver++":
            of_noise = steps.sigma_next * np.sqrt(-np.expm1(-2 * h))
            return ratio * np.exp(-h), -steps.alpha_next * np.expm1(-2 * h), of_noise
    if (steps.alpha == 0).any():
        raise ValueError(f"algorithm is {algorithm!r}, which cannot start from alpha = 0; use 'dpmsolver++'")
    if algorithm == "sde-dpmsolver" and (steps.sigma_next == 0).any():
        raise ValueError("algorithm is 'sde-dpmsolver', whose noise does not vanish at sigma = 0; end above it")
    c_x = steps.alpha_next / steps.alpha
    # σ'·e^h is finite where σ' is 0 and h infinite.
    finite = np.isfinite(h)
    of_eps = np.where(finite, steps.sigma_next * np.expm1(np.where(finite, h, 0.0)), c_x * steps.sigma)
    if algorithm == "dpmsolver":
        return c_x, -of_eps, none
    return c_x, -2 * of_eps, steps.sigma_next * np.sqrt(np.expm1(2 * h))


def _higher_orders(
    steps: Transitions, h: np.ndarray, algorithm: str, solver_type: str, order: np.ndarray, third: str
) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of D1 and D2, (R,) each, of no meaning in rows of lower order."""
    data, stochastic = algorithm.endswith("++"), algorithm.startswith("sde-")
    z = np.where(order > 1, -h if data else h, 0.0) * (2 if stochastic and data else 1)
    factor = -steps.alpha_next if data else -steps.sigma_next * (2 if stochastic else 1)
    midpoint = (solver_type == "midpoint") & (order == 2)
    of_d1 = factor * z * np.where(midpoint, phi(1, z) / 2, phi(2, z))
    of_d2 = factor * z * phi(3, z) * (2 if third == "taylor" else 1)
    if third == "diffusers" and algorithm == "sde-dpmsolver++":
        of_d2 = of_d2 + factor
    return of_d1, of_d2
