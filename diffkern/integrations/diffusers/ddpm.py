"""DDPMScheduler: Ho et al. 2020, arXiv 2006.11239, with diffusers' interface."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from numpy.typing import ArrayLike
from torch import Tensor

from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.integrations.diffusers.scheduler import Scheduler
from diffkern.integrations.diffusers.spacing import custom_timesteps, spaced_timesteps
from diffkern.integrations.diffusers.steps import SingleSteps, single_steps
from diffkern.integrations.draws import Generators
from diffkern.ops._memory import output_like
from diffkern.solvers import StepProgram, Transitions, step_program

LEARNED = ("learned", "learned_range")
LARGE = ("fixed_large", "fixed_large_log")
# None and "other", which diffusers' own configs and tests hold, mean β̃ there, and so here.
SMALL = ("fixed_small", "fixed_small_log", "other", None)
LEAST_VARIANCE = 1e-20  # of diffusers, so that β̃ of a step to ᾱ = 1 has a logarithm


class DDPMScheduler(Scheduler):
    """Drop-in for diffusers' DDPMScheduler: same arguments, config, timesteps and, from a generator, numbers.

    variance_type is the variance of a step's noise: "fixed_small" and "fixed_small_log" β̃, "fixed_large" and
    "fixed_large_log" β, "learned" the exponential of the network's further C channels, "learned_range" an interpolation
    between log β̃ and log β that they say. (diffusers gives NaN for "fixed_large_log" and takes the channels of
    "learned" as the variance itself, NaN where they are negative.)

    A step's coefficients are reckoned in the dtype of `alphas_cumprod`, float32 unless it is replaced, as diffusers
    does: β of a single step, 1 − ᾱ_t/ᾱ_{t−1}, is good to 3e-4 there, and the images of a thousand steps to 5e-5. The
    step itself is float32 whatever the sample's dtype.
    """

    beta_schedules = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        noise: str = "torch",
    ) -> None:
        self._set_up(noise)
        self.one = torch.tensor(1.0)
        self.variance_type = variance_type
        self.custom_timesteps = False
        self._set_timesteps(np.arange(num_train_timesteps, dtype=np.int64)[::-1], None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Sets `timesteps`, int64, falling: num_inference_steps of them as timestep_spacing says, or those given.

        Raises ValueError for a number outside [1, num_train_timesteps], for timesteps that do not fall within
        [0, num_train_timesteps), if both are given, and for an unknown spacing.
        """
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError("num_inference_steps and timesteps are both given; one of them must be None")
            chosen = custom_timesteps(timesteps, self.config.num_train_timesteps)
        else:
            chosen = spaced_timesteps(self.config, num_inference_steps)
            self.num_inference_steps = num_inference_steps
        self.custom_timesteps = timesteps is not None
        self._set_timesteps(chosen, device)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The timestep to which a step from `timestep` leads, −1 for the sample itself: a tensor () of `timesteps`.

        Before set_timesteps it is timestep − 1. Raises ValueError for one that is not in `timesteps`.
        """
        if not self._spaced:
            return timestep - 1
        known = self._host_timesteps()
        places = np.flatnonzero(known == self._value(timestep))
        if not places.size:
            raise ValueError(f"timestep is {timestep}; it must be one of timesteps, {known.tolist()}")
        following = places[0] + 1
        return self.timesteps[following] if following < len(known) else torch.tensor(-1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """x at the step before `timestep`, and the x0 seen there, of sample's shape (N, C, …) and format.

        model_output: (N, C, …), with a learned variance (N, 2C, …) = [mean; variance]. The results have the promoted
        dtype of both. Noise is drawn unless `timestep` is 0. After set_timesteps, `timestep` is one of `timesteps` and
        the step leads to the next of them; before, it is any of the process's and leads to the one below.

        Raises ValueError for another timestep or shape, an unknown variance_type, and where x0 cannot be had from ε
        (ᾱ = 0).
        """
        steps = self._steps()
        value = self._value(timestep)
        row = steps.row(value)
        sample = self._promoted(sample, model_output)
        # The row of timestep 0 has no noise, and does not read what is given for it.
        source = self._noise_source(model_output, sample, generator) if value > 0 else {"noise": sample}
        x0 = output_like(sample)
        x_next = self._advance(steps.program, row, model_output, sample, [x0], **source)
        return SchedulerOutput(x_next, x0) if return_dict else (x_next, x0)

    @property
    def _spaced(self) -> bool:
        """Whether steps lead from each of `timesteps` to the next, not to the timestep below."""
        return bool(self.custom_timesteps or self.num_inference_steps)

    def _steps(self) -> SingleSteps:
        timesteps = self._host_timesteps()  # first: it clears the programs if somebody has replaced them
        key = (self._spaced, self.variance_type)
        if key not in self._programs:
            if not self._spaced:
                timesteps = np.arange(len(self._abar))[::-1]
            # A spacing's offset can lead beyond the process, and users assign what they like.
            inside = timesteps[np.isin(timesteps, np.arange(len(self._abar)))].astype(np.int64)
            rising = np.argsort(inside, kind="stable")
            self._programs[key] = single_steps(
                self._abar[inside][rising],
                inside[rising],
                np.append(self._abar[inside[1:]], 1.0)[rising],
                self.prediction,
                self._program,
                denoising=True,
            )
        return self._programs[key]

    def _posterior(self, abar: ArrayLike, abar_next: ArrayLike) -> tuple[np.ndarray, ...]:
        """Weights of x0 and x in the posterior's mean, β̃, β (Ho et al. 2020, arXiv 2006.11239, eq. 7), float64."""
        dtype = torch.float64 if self._alphas_cumprod.dtype == torch.float64 else torch.float32
        at, to = (torch.as_tensor(level, dtype=dtype) for level in (abar, abar_next))
        ratio = at / to
        beta = 1 - ratio
        terms = to.sqrt() * beta / (1 - at), ratio.sqrt() * (1 - to) / (1 - at), (1 - to) / (1 - at) * beta, beta
        return tuple(term.double().numpy() for term in terms)

    def _program(self, steps: Transitions) -> StepProgram:
        c_0, c_x, small, large = self._posterior(steps.alpha**2, steps.alpha_next**2)
        small, large = np.maximum(small, LEAST_VARIANCE), np.maximum(large, LEAST_VARIANCE)
        named = {**steps.x0_columns(), "c_0": c_0, "c_x": c_x}
        if self.variance_type in LEARNED:
            std = np.ones(steps.num_rows)
            named |= {"log_var_min": np.log(small), "log_var_max": np.log(large)}
        elif self.variance_type in LARGE:
            std = np.sqrt(large)
        elif self.variance_type in SMALL:
            std = np.sqrt(small)
        else:
            known = ", ".join(repr(name) for name in (*SMALL[:2], *LARGE, *LEARNED))
            raise ValueError(f"variance_type is {self.variance_type!r}; it may be one of {known}")
        named["c_z"] = np.where(steps.times > 0, std, 0.0)
        return step_program(
            named,
            steps.times,
            variance=self.variance_type if self.variance_type in LEARNED else "fixed",
            clip=self._clip(),
            threshold=self._threshold(),
        ).with_x0()

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor | None:
        """What diffusers' method of this name says of the step from t, float32 (), or of predicted_variance's shape.

        That is the variance of its noise, but the standard deviation for "fixed_small_log", and the log-variance for
        "fixed_large_log" and learned ones.
        """
        kind = self.variance_type if variance_type is None else variance_type
        if kind == "learned":
            return predicted_variance
        ends = np.array([int(self._value(t)), int(self.previous_timestep(t))])
        abar, abar_prev = self._abar_at(ends, before=1.0)
        _, _, posterior_variance, beta = self._posterior(abar, abar_prev)
        small = max(float(posterior_variance), LEAST_VARIANCE)
        if kind == "learned_range":
            if predicted_variance is None:
                raise ValueError("predicted_variance is None; variance_type 'learned_range' needs the network's")
            fraction = (predicted_variance + 1) / 2
            return fraction * float(np.log(beta)) + (1 - fraction) * float(np.log(small))
        value = beta if kind in LARGE else small
        if kind == "fixed_small_log":
            value = np.sqrt(value)
        elif kind == "fixed_large_log":
            value = np.log(value)
        return torch.tensor(value, dtype=torch.float32)
