"""DDIMInverseScheduler: DDIM from an image to its noise (arXiv 2010.02502, section 4.3), with diffusers' interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.integrations.diffusers.scheduler import Scheduler
from diffkern.integrations.diffusers.spacing import spaced_timesteps
from diffkern.integrations.diffusers.steps import SingleSteps, single_steps
from diffkern.integrations.diffusers.tables import EndLevel
from diffkern.ops._memory import output_like
from diffkern.solvers import ddim


class DDIMInverseScheduler(Scheduler):
    """Drop-in for diffusers' DDIMInverseScheduler: same arguments, config and timesteps.

    `timesteps` rise; a step to one of them starts num_train_timesteps // num_inference_steps below it, where the sample
    is taken to be, and goes by what the network says of it at the upper one. The first starts from ᾱ of
    `initial_alpha_cumprod`: 1 with set_alpha_to_one, so from an image without noise.

    Further arguments are accepted, as diffusers accepts them, and ignored; set_alpha_to_zero is its old name of
    set_alpha_to_one.
    """

    _deprecated_kwargs = ["set_alpha_to_zero"]  # noqa: RUF012
    _compatibles = []  # noqa: RUF012
    ignore_for_config = ["kwargs", "noise"]  # noqa: RUF012
    spacings = ("leading", "trailing")
    initial_alpha_cumprod = EndLevel()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        noise: str = "torch",
        **kwargs: Any,
    ) -> None:
        self._set_up(noise)
        if kwargs.get("set_alpha_to_zero") is not None:
            set_alpha_to_one = kwargs["set_alpha_to_zero"]
        self.initial_alpha_cumprod = 1.0 if set_alpha_to_one else self._abar[0]
        self._set_timesteps(np.arange(num_train_timesteps, dtype=np.int64), None)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets `timesteps`, int64 (num_inference_steps,), rising, spaced as the config's timestep_spacing says.

        Raises ValueError for a number outside [1, num_train_timesteps] and for an unknown spacing.
        """
        self._set_timesteps(spaced_timesteps(self.config, num_inference_steps, self.spacings)[::-1], device)
        self.num_inference_steps = num_inference_steps

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """x at `timestep`, and the x0 seen on the way, of sample's shape (N, C, …) and format.

        model_output: of sample's shape; the results have the promoted dtype of both.

        Raises ValueError before set_timesteps, for a timestep outside the process, and where x0 or ε cannot be had
        from the prediction (ε at ᾱ = 0, x0 at ᾱ = 1).
        """
        steps = self._steps()
        row = steps.row(self._value(timestep))
        sample = self._promoted(sample, model_output)
        x0 = output_like(sample)
        x_next = self._advance(steps.program, row, model_output, sample, [x0])
        return SchedulerOutput(x_next, x0) if return_dict else (x_next, x0)

    def _steps(self) -> SingleSteps:
        stride = self._stride()
        if stride not in self._programs:
            timesteps = np.arange(len(self._abar))
            self._programs[stride] = single_steps(
                self._abar_at(timesteps - stride, before=type(self).initial_alpha_cumprod.number(self)),
                timesteps,
                self._abar,
                self.prediction,
                lambda steps: ddim(steps, clip=self._clip(), rederive_eps=False).with_x0(),
                from_noise=False,
            )
        return self._programs[stride]
