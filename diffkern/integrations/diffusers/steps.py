"""Programs of single steps: one row for every timestep of the process, wherever it leads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffkern.solvers import StepProgram, Transitions
from diffkern.solvers import single_steps as transitions_of


class SingleSteps(NamedTuple):
    """A program, the timestep of each row, rising, and which rows can be executed."""

    program: StepProgram
    timesteps: np.ndarray
    usable: np.ndarray
    abar: np.ndarray
    prediction: str

    def row(self, timestep: float) -> int:
        """The row of a timestep; ValueError if it has none, or none that can be executed."""
        row = int(np.searchsorted(self.timesteps, timestep))
        if row == len(self.timesteps) or self.timesteps[row] != timestep:
            known = f"[{self.timesteps[0]}, {self.timesteps[-1]}]"
            raise ValueError(f"timestep is {timestep}; it must be a timestep of the schedule, in {known}")
        if not self.usable[row]:
            raise ValueError(
                f"timestep is {timestep}, where alphas_cumprod is {self.abar[row]}: x0 cannot be had from prediction "
                f"{self.prediction!r} there; use prediction_type 'v_prediction' or 'sample', or another schedule"
            )
        return row


def single_steps(
    abar: np.ndarray,
    timesteps: np.ndarray,
    abar_next: np.ndarray,
    prediction: str,
    solver: Callable[[Transitions], StepProgram],
) -> SingleSteps:
    """The steps from ᾱ at each of `timesteps`, rising, to abar_next, as `solver` makes them of transitions.

    A schedule may have timesteps from which no step can be made (ᾱ = 0 with ε predicted, β above 1); only to make
    that step is an error, so their rows are made of harmless numbers and marked.
    """
    at = abar[timesteps]
    least = np.finfo(np.float32).tiny if prediction == "eps" else 0.0
    usable = (at >= least) & (at < 1) & (abar_next > 0) & (abar_next <= 1)
    before, after = np.where(usable, at, 0.5), np.where(usable, abar_next, 0.5)
    steps = transitions_of(
        np.sqrt(before), np.sqrt(1 - before), np.sqrt(after), np.sqrt(1 - after), timesteps, prediction
    )
    return SingleSteps(solver(steps), timesteps, usable, at, prediction)
