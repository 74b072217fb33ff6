"""DPM-Solver and DPM-Solver++ singlestep as StepPrograms: Lu et al. 2022, arXiv 2206.00927 and 2211.01095."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffkern.solvers.churn import eps_columns
from diffkern.solvers.ddim import Clip, channels_of
from diffkern.solvers.lagrange import lagrange_integrals
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Process, Transitions, transitions

HIGHEST_ORDER = 3
X, FIRST, SECOND = range(3)  # slots: x and the network's answer at the group's start, its answer at the next point


def dpm_singlestep(
    process: Process | Transitions,
    *,
    clip: Clip = (-1.0, 1.0),
    threshold: Clip = None,
    order: int = 2,
    predicts: str = "x0",
) -> StepProgram:
    """One row for each step of `process`, taken in groups of `order` (1, 2 or 3).

    A group is one step of the solver from s, whose intermediate points s1 and s2 are the process's own steps inside it.
    With λ = log(α/σ) each of its rows leads from x_s, which slot 0 remembers, to its own end τ,

        predicts "eps" (DPM-Solver):     x_τ = α_τ/α_s·x_s − α_τ·Σ_j ε_j·∫ e^−λ·L_j(λ) dλ
        predicts "x0" (DPM-Solver++ S):  x_τ = σ_τ/σ_s·x_s + σ_τ·Σ_j x0_j·∫ e^λ·L_j(λ) dλ

    over the points s, s1, … that it knows, L_j their Lagrange polynomials. For the second of two rows the papers have,
    with r = (λ_s1 − λ_s)/(λ_τ − λ_s), the integral of e^∓λ alone times 1 − 1/(2r) and 1/(2r) (arXiv 2211.01095,
    algorithm 1; arXiv 2206.00927, algorithm 1, has r = ½). With three points the polynomial is quadratic (algorithm 2
    there, whose points are at one and two thirds of the way, takes the line through s and s2). That is of third order
    where λ's steps within a group differ little, so that s2 is near two thirds, as it is in every smooth spacing of
    many steps; of second order where their ratios stay away from 1.

    A row that leads to σ = 0 and one at α = 0 are groups of their own, of first order (DDIM with η = 0), and the
    rest may end with a smaller group. No row adds noise.

    Raises ValueError for an order or a `predicts` that there is not, and where x0 cannot be had from the prediction
    (eps at ᾱ = 0).
    """
    if order not in range(1, HIGHEST_ORDER + 1):
        raise ValueError(f"order is {order!r}; it must be an int in [1, {HIGHEST_ORDER}]")
    if predicts not in ("eps", "x0"):
        raise ValueError(f"predicts is {predicts!r}; it may be 'eps' or 'x0'")
    steps = transitions(process)
    rows = steps.num_rows
    of_x0 = predicts == "x0"
    scale, scale_next = (steps.sigma, steps.sigma_next) if of_x0 else (steps.alpha, steps.alpha_next)

    eps = eps_columns(steps, clip is not None or threshold is not None)
    # What is interpolated, as a combination of x, m and x0.
    answer = (np.zeros(rows), np.zeros(rows), np.ones(rows)) if of_x0 else eps
    # The first row of a group is a step of DDIM, α'·x0 + σ'·ε.
    c = [steps.sigma_next * eps[0], steps.sigma_next * eps[1], steps.alpha_next + steps.sigma_next * eps[2]]
    history = np.zeros((rows, order + 1))
    # Of what goes to a row's two slots: x and the answer in a group's first row, the answer in its second.
    g0 = [np.zeros(rows) for _ in range(3)]
    writes = np.full((rows, 2), -1)
    for group in _groups(steps, order):
        start = group[0]
        if len(group) > 1:
            writes[start] = X, FIRST
            g0[0][start] = 1.0
        for i in group[1:]:
            known = group[: group.index(i) + 1]
            weights = scale_next[i] * _weights(steps, known, of_x0, middle=len(group) == 2)
            history[i, X] = scale_next[i] / scale[start]
            history[i, FIRST : FIRST + len(known) - 1] = weights[:-1]
            for column, part in zip(c, answer, strict=True):
                column[i] = weights[-1] * part[i]
            if i != group[-1]:
                writes[i, 0] = SECOND
                for column, part in zip(g0, answer, strict=True):
                    column[i] = part[i]
    named = steps.x0_columns() | dict(zip(("c_x", "c_m", "c_0"), c, strict=True))
    slots = order + 1 if (writes >= 0).any() else 0
    if slots:
        named |= {f"c_h{k}": history[:, k] for k in range(slots)}
        for j, parts in enumerate((g0, answer)):
            named |= dict(zip((f"g{j}_x", f"g{j}_m", f"g{j}_0"), parts, strict=True))
    return step_program(
        named,
        steps.times,
        writes=writes,
        num_slots=slots,
        variance=channels_of(process),
        clip=clip,
        threshold=threshold,
    )


def _groups(steps: Transitions, order: int) -> list[list[int]]:
    """Rows in the groups that make one step of the solver each."""
    alone = ~(np.isfinite(steps.log_snr) & np.isfinite(steps.log_snr_next))
    groups: list[list[int]] = []
    for i in range(steps.num_rows):
        if not groups or len(groups[-1]) == order or alone[i] or alone[groups[-1][-1]]:
            groups.append([])
        groups[-1].append(i)
    return groups


def _weights(steps: Transitions, known: Sequence[int], of_x0: bool, *, middle: bool) -> np.ndarray:
    """The integrals over the step from known[0] to the end of known[-1], of the answers at `known`."""
    nodes = steps.log_snr[known]
    start, end = nodes[0], steps.log_snr_next[known[-1]]
    if middle:
        half = (end - start) / (2 * (nodes[1] - start))
        nodes, shares = nodes[:1], np.array([1 - half, half])
    else:
        shares = np.ones(len(known))
    if of_x0:
        return shares * lagrange_integrals(nodes.tolist(), start, end, np.exp)
    return -shares * lagrange_integrals(nodes.tolist(), start, end, lambda u: np.exp(-u))
