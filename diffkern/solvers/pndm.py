"""Pseudo numerical methods, Liu et al. 2022, arXiv 2202.09778, as StepPrograms: PLMS and PNDM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.churn import eps_columns
from diffkern.solvers.ddim import channels_of
from diffkern.solvers.program import StepProgram, columns, step_program
from diffkern.solvers.transitions import Transitions, transitions

Clip = tuple[float, float] | None

# Adams–Bashforth (eq. 12): of the newest ε, the one before it, and so on, by how many there are.
WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
RUNGE_KUTTA_STEPS = 3


class Transfer(NamedTuple):
    """φ of eq. 11, from x at one level to another along ε: x' = of_x·x + of_eps·ε, a step of DDIM with η = 0."""

    of_x: Any
    of_eps: Any


def transfer(alpha: Any, sigma: Any, alpha_next: Any, sigma_next: Any) -> Transfer:
    """φ from x = alpha·x0 + sigma·ε to alpha_next·x0 + sigma_next·ε, numbers or arrays; alpha is above 0."""
    return Transfer(alpha_next / alpha, sigma_next - alpha_next * sigma / alpha)


def plms(process: GaussianProcess | Transitions, *, clip: Clip = (-1.0, 1.0), threshold: Clip = None) -> StepProgram:
    """R + 1 rows for R steps of `process`, from t = T−1 to 0: linear multistep in ε without Runge–Kutta.

    A step goes along (55·ε_t − 59·ε_{t+1} + 37·ε_{t+2} − 9·ε_{t+3})/24 by the transfer φ (eq. 11, 12). Lower orders
    begin: the first step is Heun's, a row along ε and one along the mean of it and the next; the two after it are of
    order 2 and 3 (as in latent-diffusion's PLMS and with diffusers' skip_prk_steps). ε follows from the clipped x0.
    Slots 0, 1, 2 hold those of three rows before. One step alone is DDIM's.

    A step from α = 0, where φ does not exist, is DDIM's, and what follows begins as if it were the first. Transitions
    must follow each other. Raises ValueError if they do not, and where x0 cannot be had from the prediction (eps at
    ᾱ = 0).
    """
    steps = transitions(process)
    rows = _Rows(steps, clipped=clip is not None or threshold is not None)
    first = rows.from_zero()
    if first < steps.num_rows - 1:
        phi = rows.transfer(first)
        halfway_there = _Sum(phi.of_x, phi.of_eps / 2)
        rows.add(steps, first, _Sum(phi.of_x, phi.of_eps), {0: _Sum(eps=1.0), 1: halfway_there})
        rows.add(steps, first + 1, _Sum(eps=phi.of_eps / 2, slots={1: 1.0}))
        rows.multistep(first, first + 1)
    else:
        rows.multistep(first, first)
    return rows.program(3, channels_of(process), clip, threshold)


def pndm(
    process: GaussianProcess | Transitions,
    middles: Transitions,
    *,
    clip: Clip = (-1.0, 1.0),
    threshold: Clip = None,
) -> StepProgram:
    """F-PNDM: three steps of Runge–Kutta, four rows each (eq. 13), then linear multistep of order 4 as in `plms`.

    `middles` has a row for each of those steps, at a level between its ends, as `halfway` finds them; only their
    levels, times and predictions count. Of fewer than four steps all but the last are Runge–Kutta's. Slots 0, 1, 2
    hold ε of earlier rows, 3 the state that a step began with, 4 a sum of its ε.

    As for the rest, see `plms`. Raises ValueError, too, for a middle that is missing or lies outside its step.
    """
    steps = transitions(process)
    rows = _Rows(steps, clipped=clip is not None or threshold is not None)
    first = rows.from_zero()
    warm = max(min(RUNGE_KUTTA_STEPS, steps.num_rows - 1 - first), 0)
    _check_middles(steps, middles, first, warm)
    for i in range(warm):
        step = first + i
        half = transfer(steps.alpha[step], steps.sigma[step], middles.alpha[i], middles.sigma[i])
        whole = rows.transfer(step)
        rows.add(steps, step, _Sum(half.of_x, half.of_eps), {i: _Sum(eps=1.0), 3: _Sum(x=1.0)})
        again = _Sum(eps=half.of_eps, slots={3: half.of_x})
        rows.add(middles, i, again, {4: _Sum(eps=1 / 3, slots={i: 1 / 6})})
        to_the_end = _Sum(eps=whole.of_eps, slots={3: whole.of_x})
        rows.add(middles, i, to_the_end, {4: _Sum(eps=1 / 3, slots={4: 1.0})})
        rows.add(steps, step + 1, _Sum(eps=whole.of_eps / 6, slots={3: whole.of_x, 4: whole.of_eps}))
    rows.multistep(first, first + warm)
    return rows.program(5, channels_of(process), clip, threshold)


def halfway(process: GaussianProcess, full: GaussianProcess) -> Transitions:
    """The `middles` of `pndm` for `process`, respaced from `full`: its timesteps nearest to the middles, rounded down.

    Raises ValueError where two steps to be halved have no timestep between them, and for a single step.
    """
    first = int(process.alphas_cumprod[-1] == 0)  # from there Runge–Kutta cannot go
    kept = np.searchsorted(full.timestep_map, process.timestep_map)[::-1][first : first + RUNGE_KUTTA_STEPS + 1]
    if len(kept) < 2:
        raise ValueError(f"the process has {process.num_timesteps} steps; Runge–Kutta needs {2 + first} at least")
    between = kept[1:] + (kept[:-1] - kept[1:]) // 2
    if (between == kept[1:]).any():
        raise ValueError(
            f"the process has {process.num_timesteps} of {full.num_timesteps} steps; Runge–Kutta needs a timestep "
            "between each two of the first: take at most half as many steps, or plms"
        )
    # Not full.keep(between): where ᾱ is below float64's resolution of 1, a process that begins there has β = 1.
    rows, steps = full.num_timesteps - 1 - between, transitions(full)
    return Transitions(**{column.name: getattr(steps, column.name)[rows] for column in fields(Transitions)})


class _Sum(NamedTuple):
    """x·(the state) + eps·ε + Σ_k slots[k]·h_k."""

    x: float = 0.0
    eps: float = 0.0
    slots: Mapping[int, float] = {}


class _Rows:
    """A table in the making."""

    def __init__(self, steps: Transitions, clipped: bool) -> None:
        steps.check_chain()
        self.steps, self.clipped = steps, clipped
        self.named: list[dict[str, float]] = []
        self.times: list[float] = []
        self.writes: list[list[int]] = []

    def add(self, at: Transitions, i: int, x_next: _Sum, remember: Mapping[int, _Sum] | None = None) -> None:
        """A row whose network is called at the level where row i of `at` begins, and what it remembers by slot."""
        of_eps = [column[i] for column in eps_columns(at, self.clipped)]
        row = {"a_x": at.a_x[i], "a_m": at.a_m[i]}
        remember = remember or {}
        for family, total in zip(("c", "g0", "g1"), (x_next, *remember.values()), strict=False):
            row[f"{family}_x"] = total.x + total.eps * of_eps[0]
            row[f"{family}_m"] = total.eps * of_eps[1]
            row[f"{family}_0"] = total.eps * of_eps[2]
            row |= {f"{family}_h{k}": weight for k, weight in total.slots.items()}
        self._append(row, at.times[i], list(remember))

    def _append(self, row: dict[str, float], time: float, writes: list[int]) -> None:
        self.named.append(row)
        self.times.append(time)
        self.writes.append([*writes, -1, -1][:2])

    def transfer(self, step: int) -> Transfer:
        s = self.steps
        return transfer(s.alpha[step], s.sigma[step], s.alpha_next[step], s.sigma_next[step])

    def from_zero(self) -> int:
        """Where φ exists: at step 1 after a row of DDIM if the first begins at α = 0, else at step 0."""
        s = self.steps
        if s.alpha[0] > 0:
            return 0
        row = {"a_x": s.a_x[0], "a_m": s.a_m[0], "c_x": s.sigma_next[0] / s.sigma[0], "c_0": s.alpha_next[0]}
        self._append(row, s.times[0], [])
        return 1

    def multistep(self, first: int, begin: int) -> None:
        """Rows for the steps from `begin` on; slot (i − first) % 3 holds ε of step i, the oldest being first's."""
        for step in range(begin, self.steps.num_rows):
            phi, n = self.transfer(step), step - first
            newest, *older = WEIGHTS[min(n, len(WEIGHTS) - 1)]
            slots = {(n - j) % 3: phi.of_eps * weight for j, weight in enumerate(older, 1)}
            remember = {n % 3: _Sum(eps=1.0)} if step < self.steps.num_rows - 1 else {}
            self.add(self.steps, step, _Sum(phi.of_x, phi.of_eps * newest, slots), remember)

    def program(self, num_slots: int, variance: str, clip: Clip, threshold: Clip) -> StepProgram:
        return step_program(
            {name: [row.get(name, 0.0) for row in self.named] for name in columns(num_slots) if name != "s"},
            self.times,
            writes=self.writes,
            num_slots=num_slots,
            variance=variance,
            clip=clip,
            threshold=threshold,
        )


def _check_middles(steps: Transitions, middles: Transitions, first: int, warm: int) -> None:
    if middles.num_rows < warm:
        raise ValueError(
            f"middles have {middles.num_rows} rows; they must have one for each of {warm} Runge–Kutta steps"
        )
    for i, step in enumerate(range(first, first + warm)):
        noise = [
            s / a
            for a, s in (
                (steps.alpha[step], steps.sigma[step]),
                (middles.alpha[i], middles.sigma[i]),
                (steps.alpha_next[step], steps.sigma_next[step]),
            )
        ]
        if not noise[0] > noise[1] > noise[2]:
            raise ValueError(f"middles[{i}] has sigma/alpha {noise[1]}; it must lie between {noise[0]} and {noise[2]}")
