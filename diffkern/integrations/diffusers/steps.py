"""Programs of single steps: one row for every timestep of the process, wherever it leads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffkern.solvers import StepProgram, Transitions
from diffkern.solvers import single_steps as transitions_of

LEAST_ABAR = np.finfo(np.float32).tiny  # from which 1/√ᾱ is still a float32


class SingleSteps(NamedTuple):
    """A program; the timestep of each row, rising; ᾱ from which and to which it leads; which rows can be executed."""

    program: StepProgram
    timesteps: np.ndarray
    abar: np.ndarray
    abar_next: np.ndarray
    usable: np.ndarray

    def row(self, timestep: float) -> int:
        """The row of a timestep; ValueError if it has none, or none that can be executed."""
        row = int(self.timesteps.searchsorted(timestep))
        if row == len(self.timesteps) or self.timesteps[row] != timestep:
            known = f"{len(self.timesteps)} in [{self.timesteps[0]}, {self.timesteps[-1]}]"
            raise ValueError(f"timestep is {timestep}; it must be one of the schedule's, {known}")
        if not self.usable[row]:
            raise ValueError(
                f"timestep is {timestep}, where a step would lead from alphas_cumprod {self.abar[row]} to "
                f"{self.abar_next[row]}: none can be made with this prediction_type; 'epsilon' needs a schedule that "
                "stays above 0, 'sample' one that stays below 1, 'v_prediction' takes both"
            )
        return row


def single_steps(
    abar: np.ndarray,
    timesteps: np.ndarray,
    abar_next: np.ndarray,
    prediction: str,
    solver: Callable[[Transitions], StepProgram],
    *,
    from_noise: bool = True,
    denoising: bool = False,
) -> SingleSteps:
    """The steps at `timesteps` (R,), rising, from ᾱ = abar to abar_next, (R,) each, as `solver` makes them.

    `from_noise`: the solver divides by √(1−ᾱ). `denoising`: by √ᾱ of abar_next too, and ᾱ must not fall.

    A schedule may have timesteps from which no step can be made (ᾱ = 0 with ε predicted, β above 1); only to make that
    step is an error, so their rows are made of harmless numbers and marked.
    """
    usable = (abar >= (LEAST_ABAR if prediction == "eps" else 0.0)) & (abar <= 1)
    usable &= (abar_next >= 0) & (abar_next <= 1)
    if from_noise or prediction == "x0":
        usable &= abar < 1
    if denoising:
        usable &= (abar <= abar_next) & (abar_next > 0)
    before, after = np.where(usable, abar, 0.5), np.where(usable, abar_next, 0.5)
    steps = transitions_of(
        np.sqrt(before), np.sqrt(1 - before), np.sqrt(after), np.sqrt(1 - after), timesteps, prediction
    )
    return SingleSteps(solver(steps), timesteps, abar, abar_next, usable)
