"""GaussianDiffusion: OpenAI's class of this name, each step and each loss one pass over memory.

Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (2102.09672), Song et al. 2021 (2010.02502) and, with a
classifier, Dhariwal & Nichol 2021 (2105.05233).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern import process
from diffkern.integrations.draws import first_noise
from diffkern.integrations.guided_diffusion.distributions import DenoisedFn, Kwargs, Model
from diffkern.integrations.guided_diffusion.steps import Steps
from diffkern.integrations.guided_diffusion.tables import _extract_into_tensor as _extract_into_tensor
from diffkern.integrations.guided_diffusion.training import Training
from diffkern.integrations.guided_diffusion.types import LossType as LossType
from diffkern.integrations.guided_diffusion.types import ModelMeanType as ModelMeanType
from diffkern.integrations.guided_diffusion.types import ModelVarType as ModelVarType

_SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": process.linear_betas, "cosine": process.cosine_betas}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """β (T,), float64, of "linear" (1e-4·1000/T to 0.02·1000/T) or "cosine" (arXiv 2102.09672, eq. 17).

    Raises ValueError for another name, and for a T below 20 with "linear", whose last β would pass 1.
    """
    if schedule_name not in _SCHEDULES:
        known = ", ".join(map(repr, _SCHEDULES))
        raise ValueError(f"schedule_name is {schedule_name!r}; it may be one of {known}")
    return _SCHEDULES[schedule_name](num_diffusion_timesteps)


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """β_t = min(1 − ᾱ((t+1)/T)/ᾱ(t/T), max_beta), float64 (T,), for a function ᾱ on [0, 1] that falls from 1."""
    return process.betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta)


class GaussianDiffusion(Training, Steps):
    """Diffusion with the schedule `betas` (T,) in (0, 1], and training of and sampling from a network that reverses it.

    `model_mean_type` and `model_var_type` say what the network's output is, `loss_type` what trains it. With
    `rescale_timesteps` the network is given t·1000/T as a float instead of t. `noise` is this library's own: "torch"
    draws what the replaced code would, in its order; "philox" draws one number a step and makes the noise from it
    inside the step: faster, as repeatable, and other noise.

    The tables are float64 arrays (T,): `betas`, `alphas_cumprod`, `alphas_cumprod_prev`, `alphas_cumprod_next`,
    `sqrt_alphas_cumprod`, `sqrt_one_minus_alphas_cumprod`, `log_one_minus_alphas_cumprod`,
    `sqrt_recip_alphas_cumprod`, `sqrt_recipm1_alphas_cumprod`, `posterior_variance`, `posterior_log_variance_clipped`,
    `posterior_mean_coef1`, `posterior_mean_coef2`; and `num_timesteps` is T. A table may be replaced, with effect from
    the next call on; writing into one raises ValueError (they are read-only).

    A step is one pass that reads x, the network's output and the noise, and writes the sample and x0; a loss is one
    that reads x0, the output and the noise, and writes the terms and their gradient. Where a subclass overrides a
    method that these are made of, they are made of those methods instead; a step also with a `denoised_fn` or a
    gradient to be taken, a loss with a gradient by x0 or the noise.

    Raises ValueError for betas out of range and for an unknown `noise`.
    """

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples of `shape` (N, C, …), float32, by all ancestral steps: the last of `p_sample_loop_progressive`."""
        return _last(
            self.p_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress
            )
        )

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """What `p_sample` returns at T−1, …, 0, without gradients, from x_T = `noise` or, without it, from a draw.

        `device` is by default that of the model's parameters; of a model that has none, noise's, or the CPU.
        `progress` shows a bar (tqdm).
        """

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(
                model,
                x,
                t,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                cond_fn=cond_fn,
                model_kwargs=model_kwargs,
            )

        return self._loop(step, model, shape, noise, device, progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Samples of `shape` (N, C, …), float32, by all steps of DDIM: the last of `ddim_sample_loop_progressive`."""
        return _last(
            self.ddim_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
            )
        )

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """What `ddim_sample` returns at T−1, …, 0; the arguments are those of `p_sample_loop_progressive`, and η."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(
                model,
                x,
                t,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                cond_fn=cond_fn,
                model_kwargs=model_kwargs,
                eta=eta,
            )

        return self._loop(step, model, shape, noise, device, progress)

    def _loop(
        self,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        if not isinstance(shape, tuple | list):
            raise TypeError(f"shape must be a tuple or a list of sizes, got {type(shape).__name__}")
        device = _device_of(model, noise) if device is None else torch.device(device)
        x = first_noise(self.noise, shape, device) if noise is None else noise
        steps: Any = range(self.num_timesteps)[::-1]
        if progress:
            from tqdm.auto import tqdm

            steps = tqdm(steps)
        for i in steps:
            t = torch.full((shape[0],), i, dtype=torch.int64, device=device)
            with torch.no_grad():
                out = step(x, t)
            yield out
            x = out["sample"]


def _last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    return collections.deque(steps, maxlen=1)[0]["sample"]


def _device_of(model: Model, noise: Tensor | None) -> torch.device:
    parameters = getattr(model, "parameters", None)
    parameter = next(iter(parameters()), None) if callable(parameters) else None
    if parameter is not None:
        return parameter.device
    return torch.device("cpu") if noise is None else noise.device
