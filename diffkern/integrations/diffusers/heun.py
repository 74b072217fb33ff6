"""HeunDiscreteScheduler: Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffkern.integrations.diffusers.exploding import ExplodingScheduler
from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.integrations.diffusers.spacing import custom_timesteps, fractional_timesteps
from diffkern.ops._memory import output_like
from diffkern.solvers import StepProgram, single_steps, step_program


class HeunDiscreteScheduler(ExplodingScheduler):
    """Drop-in for diffusers' HeunDiscreteScheduler: same arguments, config and timesteps.

    All timesteps but the first stand twice in `timesteps`: with the first the step before it is corrected, with the
    second the next begins. Between the two halves of a step `sample` is the state that it began with,
    `prev_derivative` (x − x0)/σ̂ there and `dt` the difference of the levels; else they are None.

    Levels σ̂ are diffusers' float32 ones, coefficients are made of them in float64.
    """

    order: ClassVar[int] = 2
    beta_schedules: ClassVar[tuple[str, ...]] = (*ExplodingScheduler.beta_schedules, "exp")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        noise: str = "torch",
    ) -> None:
        self._set_up(noise)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Sets `timesteps`, float32 (2·steps − 1,), and `sigmas`, one more, by num_inference_steps or timesteps.

        num_inference_steps: spaced as the config says, in num_train_timesteps if it is given. timesteps: these,
        falling in [0, T − 1], between whole numbers too.

        Raises ValueError if both or neither are given, for numbers out of range, for an unknown spacing, and for
        timesteps where the config's spacing chooses the levels.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "exactly one of num_inference_steps and timesteps must be given; "
                f"they are {num_inference_steps} and {timesteps}"
            )
        spacing, table = self._spacing(), self._sigma_table()
        if timesteps is None:
            assert num_inference_steps is not None
            visited = fractional_timesteps(self.config, num_inference_steps, num_train_timesteps)
        elif spacing is not None:
            raise ValueError("timesteps cannot be given where the config spaces the sigmas")
        else:
            visited = custom_timesteps(timesteps, self.config.num_train_timesteps, fractions=True)
        visited = visited.astype(np.float32)
        levels = np.interp(visited, np.arange(len(table)), table)
        if spacing is not None:
            levels = self._respaced(spacing, levels, len(visited))
            visited = self._sigma_to_t(levels, self._log_sigma_table()).astype(np.float32)
        self.num_inference_steps = len(visited)
        self._schedule(np.repeat(visited, 2)[1:], np.append(np.repeat(levels, 2)[1:], 0.0), device)
        self.prev_derivative: Tensor | None = None
        self.dt: Tensor | None = None
        self.sample: Tensor | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether a step of the method begins with the next call of `step`."""
        return self.dt is None

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next level as Euler's method or, in every second call, Heun's correction of it has it, and
        the x0 seen; both of sample's shape (N, C, …) and format, in the promoted dtype of sample and model_output.
        `timestep` is read only at the first step of a run.

        Raises ValueError for a timestep that is not in `timesteps`.
        """
        row, sample = self._index(timestep), self._promoted(sample, model_output)
        x0 = output_like(sample)
        if self.dt is None:
            derivative = output_like(sample)
            program = self._program("first")
            x_next = self._advance(program, row, model_output, sample, [sample, derivative, x0])
            self.prev_derivative, self.sample = derivative, sample
            self.dt = self.sigmas[row + 1] - self.sigmas[row]
        else:
            assert self.sample is not None
            assert self.prev_derivative is not None
            program = self._program("second")
            history = [self.sample, self.prev_derivative]
            x_next = self._advance(program, row, model_output, sample, [*history, x0])
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = row + 1
        return SchedulerOutput(x_next, x0) if return_dict else (x_next, x0)

    def _program(self, half: str) -> StepProgram:
        """Rows for the calls in `timesteps`; slot 0 is `sample`, slot 1 `prev_derivative`, slot 2 the x0 of a row."""
        if half not in self._programs:
            here, rows = self._checked_levels()[:-1], len(self._levels) - 1
            one = np.ones(rows)
            steps = single_steps(one, here, one, self._levels[1:], np.zeros(rows), self.prediction)
            named = steps.x0_columns()
            if half == "first":
                named["c_x"], named["c_0"] = self._levels[1:] / here, 1 - self._levels[1:] / here
                named["g0_x"], named["g0_0"] = 1 / here, -1 / here
                writes = 1
            else:
                dt = here - np.append(here[0], here[:-1])  # the first call of a run corrects nothing
                named["c_h0"], named["c_h1"] = one, dt / 2
                named["c_x"], named["c_0"] = dt / (2 * here), -dt / (2 * here)
                writes = -1
            self._programs[half] = step_program(
                named, np.zeros(rows), writes=np.tile([writes, -1], (rows, 1)), num_slots=2, clip=self._clip()
            ).with_x0()
        return self._programs[half]
