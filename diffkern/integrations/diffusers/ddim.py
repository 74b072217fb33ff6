"""DDIMScheduler: Song et al. 2021, arXiv 2010.02502, with diffusers' interface."""

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
from diffkern.integrations.draws import Generators
from diffkern.ops._memory import output_like
from diffkern.solvers import ddim


class DDIMScheduler(Scheduler):
    """Drop-in for diffusers' DDIMScheduler: same arguments, config, timesteps and, from a generator, numbers.

    Steps are computed in float32 whatever the sample's dtype; diffusers computes in the sample's.
    """

    final_alpha_cumprod = EndLevel()

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
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        noise: str = "torch",
    ) -> None:
        self._set_up(noise)
        self.final_alpha_cumprod = 1.0 if set_alpha_to_one else self._abar[0]
        self._set_timesteps(np.arange(num_train_timesteps, dtype=np.int64)[::-1], None)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets `timesteps`, int64 (num_inference_steps,), falling, spaced as the config's timestep_spacing says.

        Raises ValueError for a number outside [1, num_train_timesteps] and for an unknown spacing.
        """
        self._set_timesteps(spaced_timesteps(self.config, num_inference_steps), device)
        self.num_inference_steps = num_inference_steps

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """x at the step before `timestep`, and the x0 seen there, both of sample's shape (N, C, …) and format.

        model_output: of sample's shape; the results have the promoted dtype of both. eta in [0, 1] scales the noise,
        which is drawn only if it is above 0, or given as variance_noise. use_clipped_model_output: ε follows from the
        clipped x0. `timestep` may be any of the process's: the step leads num_train_timesteps // num_inference_steps
        down from it.

        Raises ValueError before set_timesteps, for a timestep outside the process, where x0 cannot be had from ε
        (ᾱ = 0), and if both generator and variance_noise are given.
        """
        steps = self._steps(eta, bool(use_clipped_model_output))
        row = steps.row(self._value(timestep))
        sample = self._promoted(sample, model_output)
        source: dict[str, Any] = {}
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator and variance_noise are both given; one of them must be None")
            if variance_noise is None:
                source = self._noise_source(model_output, sample, generator)
            else:
                source = {"noise": variance_noise}
        x0 = output_like(sample)
        x_next = self._advance(steps.program, row, model_output, sample, [x0], **source)
        return SchedulerOutput(x_next, x0) if return_dict else (x_next, x0)

    def _steps(self, eta: float, use_clipped_model_output: bool) -> SingleSteps:
        stride = self._stride()
        key = (stride, eta, use_clipped_model_output)
        if key not in self._programs:
            options: dict[str, Any] = {
                "eta": eta,
                "rederive_eps": use_clipped_model_output,
                "clip": self._clip(),
                "threshold": self._threshold(),
            }
            timesteps = np.arange(len(self._abar))
            self._programs[key] = single_steps(
                self._abar,
                timesteps,
                self._abar_at(timesteps - stride, before=DDIMScheduler.final_alpha_cumprod.number(self)),
                self.prediction,
                lambda steps: ddim(steps, **options).with_x0(),
                from_noise=eta > 0 or use_clipped_model_output,
                denoising=eta > 0,
            )
        return self._programs[key]

    def _get_variance(self, timestep: int | Tensor, prev_timestep: int | Tensor) -> Tensor:
        """β̃ of a step between two timesteps, float32 (): the variance of its noise at η = 1."""
        ends = np.array([int(timestep), int(prev_timestep)])
        abar, abar_prev = self._abar_at(ends, before=DDIMScheduler.final_alpha_cumprod.number(self))
        return torch.tensor((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev), dtype=torch.float32)
