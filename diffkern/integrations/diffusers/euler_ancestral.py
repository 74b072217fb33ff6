"""EulerAncestralDiscreteScheduler: Euler's method with fresh noise at every step, as in k-diffusion."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffkern.integrations.diffusers.exploding import ExplodingScheduler
from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.integrations.diffusers.spacing import fractional_timesteps
from diffkern.integrations.draws import Generators
from diffkern.ops._memory import output_like
from diffkern.solvers import StepProgram, chain, euler_ancestral


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """Drop-in for diffusers' EulerAncestralDiscreteScheduler: same arguments, config, timesteps and numbers drawn.

    Levels σ̂ are diffusers' float32 ones, coefficients are made of them in float64.
    """

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        noise: str = "torch",
    ) -> None:
        self._set_up(noise)
        visited = np.arange(num_train_timesteps, dtype=np.float64)[::-1]
        self._schedule(visited, np.append(self._sigma_table()[::-1], 0.0), None)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets `timesteps`, float32 (num_inference_steps,), spaced as the config says, and `sigmas`, one more.

        Raises ValueError for a number outside [1, num_train_timesteps] and for an unknown spacing.
        """
        visited = fractional_timesteps(self.config, num_inference_steps).astype(np.float32)
        table = self._sigma_table()
        self.num_inference_steps = num_inference_steps
        self._schedule(visited, np.append(np.interp(visited, np.arange(len(table)), table), 0.0), device)

    @property
    def prediction(self) -> str:
        if self.config.prediction_type == "sample":
            raise NotImplementedError("prediction_type is 'sample'; it may be one of 'epsilon', 'v_prediction'")
        return super().prediction

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next level, of sample's shape (N, C, …), in model_output's dtype, and the x0 seen, in
        sample's. Noise is drawn at every step, the last too, which adds none. `timestep` is read only at the first
        step of a run.

        Raises ValueError for an integer timestep and for one that is not in `timesteps`.
        """
        self._check_step(timestep)
        row, program = self._index(timestep), self._program()
        x0 = output_like(sample)
        source = self._noise_source(model_output, sample, generator)
        x_next = self._advance(program, row, model_output, sample, [x0], **source).to(model_output.dtype)
        self._step_index = row + 1
        return SchedulerOutput(x_next, x0) if return_dict else (x_next, x0)

    def _program(self) -> StepProgram:
        if None not in self._programs:
            levels = self._checked_levels()
            steps = chain(np.ones_like(levels), levels, np.zeros(len(levels) - 1), self.prediction)
            self._programs[None] = euler_ancestral(steps, clip=None).with_x0()
        return self._programs[None]
