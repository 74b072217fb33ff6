"""UniPC as StepPrograms: Zhao et al. 2023, arXiv 2302.04867."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from diffkern.process import GaussianProcess
from diffkern.solvers.ddim import channels_of
from diffkern.solvers.dpm_multistep import newest_columns
from diffkern.solvers.exponential import phi
from diffkern.solvers.history import ring_reads, ring_writes, step_lengths, usable_orders
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Transitions, transitions

VARIANTS = ("bh1", "bh2")
Pair = tuple[float, float] | None


def unipc(
    process: GaussianProcess | Transitions,
    *,
    orders: ArrayLike = 2,
    variant: str = "bh2",
    predict_x0: bool = True,
    corrector: ArrayLike = True,
    predictor: bool = True,
    clip: Pair = (-1.0, 1.0),
    threshold: Pair = None,
    history: int | None = None,
) -> StepProgram:
    """One row for each step of `process`, a chain: the corrector (UniC) of the step that led here, with the prediction
    that the network now makes, then the predictor (UniP) of the next, both in one pass.

    A step of order p from (α, σ) to (α', σ'), with λ = log(α/σ), h = λ' − λ, the prediction m0 there and those before
    it, m_k at λ_k, is (eqs. 3 and 8, algorithms 1 and 2; table 1 for B)

        x' = c_x·x − S·((e^z − 1)·m0 + B·Σ_k ρ_k·(m_k − m0)/r_k),   r_k = (λ_k − λ)/h,   B = z ("bh1"), e^z − 1 ("bh2")

    with c_x = σ'/σ, S = α', z = −h for predictions of x0 and c_x = α'/α, S = σ', z = h for those of ε. The predictor
    has k = 1 … p − 1. The corrector has k = p too, the prediction at x' itself, r_p = 1. ρ solves

        Σ_k r_k^(n−1)·ρ_k = n!·z·φ_{n+1}(z)/B,   n = 1, …, as many as there are ρ;   φ_n(z) = Σ_j z^j/(j+n)!

    except for a single ρ, which is ½ (the predictor's of order 2, the corrector's of order 1).

    `orders`: int, or ints (R,), of the predictor of each row's step and of the corrector that follows. A row is of a
    lower order where its own step or one that it looks back on is not there, infinite (σ = 0, α = 0) or of length 0; of
    order 1 it holds no B, whose "bh1" is infinite at σ = 0.
    `corrector`: whether rows correct the state that they come to, with the order of the step that led there; or ints
    (R,), the order of each row's corrector, 0 for none. The first row has no step to correct.
    `predictor=False` leaves the predictor out: x' is the corrected state, from which another solver may go on.
    x0 is clipped to `clip`, or thresholded (ratio, max); ε follows from it then.
    `history`: the number of predictions remembered. None: as many as the highest order, behind slot 0, which holds the
    state that the last row started from, corrected; they are written only where a row will read them. Given, row i
    writes that state to slot i mod 2 and its prediction to slot 2 + i mod history; with one more than the highest order
    no row overwrites what it reads itself.

    Raises ValueError for a variant, orders and a corrector that are none of these, where x0 or ε cannot be had from the
    prediction, and for steps from α = 0 with ε.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it may be one of {', '.join(map(repr, VARIANTS))}")
    steps = transitions(process)
    rows, h = steps.num_rows, step_lengths(steps)
    if not predict_x0 and (steps.alpha == 0).any():
        raise ValueError("predict_x0 is False, but a step starts from alpha = 0, where ε says nothing of x0")
    order = usable_orders(orders, h)
    corrected = _corrected_orders(corrector, order, h, variant)
    corrects = np.append(False, corrected[:-1] > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        c_x, of_m0 = _first_order(steps, h, predict_x0)
        up = _updates(steps, h, order, variant, predict_x0, corrects=False)
        uc = _updates(steps, h, corrected, variant, predict_x0, corrects=True)

    # The corrected state: of the last state, of what is remembered, and of the prediction now made.
    last = np.where(corrects, _moved(c_x), 0.0)
    now = np.where(corrects, _moved(uc.pop(0)), 0.0)
    past = {back + 1: np.where(corrects, _moved(column), 0.0) for back, column in uc.items()}
    past[1] = past.get(1, 0.0) + np.where(corrects, _moved(of_m0), 0.0) - now
    for back in [back for back in past if back > 1]:
        past[1] = past[1] - past[back]
    if predictor:
        next_now = of_m0 - sum(up.values(), np.zeros(rows))
    else:
        c_x, next_now, up = np.ones(rows), np.zeros(rows), {}
    next_past = {back: c_x * past.get(back, 0.0) + up.get(back, 0.0) for back in past.keys() | up.keys()}

    size = int(max(order.max(), corrected.max())) if history is None else history
    lasts = 1 if history is None else 2
    named = steps.x0_columns()
    for name, column in newest_columns(steps, predict_x0, clip is not None or threshold is not None).items():
        named[f"c_{name}"] = (c_x * now + next_now) * column
        named[f"g0_{name}"] = now * column
        named[f"g1_{name}"] = column
    for family, scale, remembered in (("c", c_x, next_past), ("g0", np.ones(rows), past)):
        named[f"{family}_x"] = named.get(f"{family}_x", 0.0) + np.where(corrects, 0.0, scale)
        named |= ring_reads({1: scale * last}, lasts, 0, family) | ring_reads(remembered, size, lasts, family)
    reads = {back: np.abs(next_past[back]) + np.abs(past.get(back, 0.0)) for back in next_past}
    every_row = history is not None
    writes = [ring_writes({1: last}, lasts, 0, every_row), ring_writes(reads, size, lasts, every_row)]
    return step_program(
        named,
        steps.times,
        writes=np.stack(writes, axis=1),
        num_slots=lasts + size,
        variance=channels_of(process),
        clip=clip,
        threshold=threshold,
    )


def _corrected_orders(corrector: ArrayLike, order: np.ndarray, h: np.ndarray, variant: str) -> np.ndarray:
    """int64 (R,): of which order the row after each corrects its step; 0 if it does not, as after the last."""
    asked = np.asarray(corrector)
    if (
        asked.dtype.kind not in "biu"
        or asked.shape not in ((), h.shape)
        or (asked.dtype.kind != "b" and asked.ndim == 0)
    ):
        raise ValueError(f"corrector is {corrector!r}; it must be a bool, or bools or ints of shape {h.shape}")
    if (asked < 0).any():
        raise ValueError(f"corrector is {corrector!r}; orders must be 0, for none, or more")
    after = np.append(np.broadcast_to(asked, h.shape)[1:], 0)
    wanted = order * after if asked.dtype.kind == "b" else after
    possible = usable_orders(max(int(wanted.max()), 1), h)
    # An infinite step has an infinite B of "bh1".
    return np.where((variant == "bh1") & ~np.isfinite(h), 0, np.minimum(wanted, possible))


def _first_order(steps: Transitions, h: np.ndarray, predict_x0: bool) -> tuple[np.ndarray, np.ndarray]:
    """c_x and the coefficient of m0 in a step of order 1, (R,) each."""
    if predict_x0:
        c_x = steps.sigma_next / steps.sigma
        return c_x, steps.alpha_next - steps.alpha * c_x
    c_x = steps.alpha_next / steps.alpha
    # σ'·e^h is finite where σ' is 0 and h infinite.
    finite = np.isfinite(h)
    return c_x, -np.where(finite, steps.sigma_next * np.expm1(np.where(finite, h, 0.0)), c_x * steps.sigma)


def _updates(
    steps: Transitions, h: np.ndarray, order: np.ndarray, variant: str, predict_x0: bool, corrects: bool
) -> dict[int, np.ndarray]:
    """−S·B·ρ_k/r_k of each row's step, (R,), by how many rows back m_k lies; 0 is a corrector's prediction at x'."""
    scale = -steps.alpha_next if predict_x0 else -steps.sigma_next
    highest = int(order.max())
    found = {back: np.zeros(len(h)) for back in range(0 if corrects else 1, max(highest, 1))}
    for p in range(1, highest + 1):
        at = np.flatnonzero(order == p)
        unknowns = p if corrects else p - 1
        if not at.size or not unknowns:
            continue
        z = -h[at] if predict_x0 else h[at]
        b = np.expm1(z) if variant == "bh2" else z
        lengths = np.stack([h[at - back] for back in range(1, p)], axis=1) if p > 1 else np.zeros((at.size, 0))
        r = -np.cumsum(lengths, axis=1) / h[at, None]
        if corrects:
            r = np.append(r, np.ones((at.size, 1)), axis=1)
        if unknowns == 1:
            rho = np.full((at.size, 1), 0.5)
        else:
            matrix = np.stack([r**n for n in range(unknowns)], axis=1)
            sides = [math.factorial(n) * z * phi(n + 1, z) / b for n in range(1, unknowns + 1)]
            rho = np.linalg.solve(matrix, np.stack(sides, axis=1)[..., None])[..., 0]
        weights = (scale[at] * b)[:, None] * rho / r
        for k in range(unknowns):
            found[0 if corrects and k == unknowns - 1 else k + 1][at] = weights[:, k]
    return found


def _moved(column: np.ndarray) -> np.ndarray:
    """A column of the step before each row; the first row has none: 0."""
    return np.append(0.0, column[:-1])
