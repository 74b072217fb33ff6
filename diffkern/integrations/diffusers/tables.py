"""β of diffusers' configurations, rounded to float32 on the way as diffusers rounds them.

A drop-in gives the same images, and these tables' last digits are in them: after a thousand steps of DDPM to 5e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.process import betas_for_alpha_bar

COSINE = "squaredcos_cap_v2"


def make_betas(config: Any, schedules: tuple[str, ...]) -> Tensor:
    """β, float32 (T,), of a scheduler's config, whose class knows `schedules`. It may leave [0, 1], as in diffusers.

    Raises NotImplementedError, as diffusers does, for another beta_schedule.
    """
    if config.trained_betas is not None:
        betas = torch.as_tensor(np.array(config.trained_betas), dtype=torch.float32)
        if betas.dim() != 1 or not betas.numel():
            raise ValueError(f"trained_betas have shape {tuple(betas.shape)}; they must be 1-D and not empty")
    elif config.beta_schedule not in schedules:
        raise NotImplementedError(f"beta_schedule is {config.beta_schedule!r}; it may be one of {', '.join(schedules)}")
    else:
        betas = _SCHEDULES[config.beta_schedule](config.num_train_timesteps, config.beta_start, config.beta_end)
    return zero_terminal_snr(betas) if getattr(config, "rescale_betas_zero_snr", False) else betas


class EndLevel:
    """Attribute of a scheduler: ᾱ past an end of the process, to which users may assign another number.

    Users read a float32 tensor (); `number` is what programs are made of, known without asking a device.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.stored = f"_{name}"

    def number(self, scheduler: Any) -> float:
        return vars(scheduler)[self.stored][0]

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        return self if scheduler is None else vars(scheduler)[self.stored][1]

    def __set__(self, scheduler: Any, value: float | Tensor) -> None:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        vars(scheduler)[self.stored] = (float(value), tensor)
        scheduler._forget_programs()


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """β with √ᾱ shifted and scaled so that the last ᾱ is 0 (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def _of_alpha_bar(alpha_bar: Callable[[float], float]) -> Callable[[int, float, float], Tensor]:
    """A schedule that begin and end do not change."""

    def betas(num_timesteps: int, start: float, end: float) -> Tensor:
        return torch.tensor(betas_for_alpha_bar(num_timesteps, alpha_bar), dtype=torch.float32)

    return betas


def _laplace(num_timesteps: int, start: float, end: float) -> Tensor:
    """ᾱ(u) with a Laplace-distributed log-SNR (Hang & Gu 2024, arXiv 2407.03297), as diffusers reads it."""

    def alpha_bar(u: float) -> float:
        log_snr = -0.5 * np.copysign(1.0, 0.5 - u) * np.log(1.0 - 2.0 * abs(0.5 - u) + 1e-6)
        return float(np.sqrt(1.0 / (1.0 + np.exp(-log_snr))))

    at = np.array([alpha_bar(t / num_timesteps) for t in range(num_timesteps + 1)])
    return torch.tensor(np.minimum(1.0 - at[1:] / at[:-1], 0.999), dtype=torch.float32)


_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": lambda n, start, end: torch.linspace(start, end, n, dtype=torch.float32),
    "scaled_linear": lambda n, start, end: torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2,
    COSINE: _of_alpha_bar(lambda u: float(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)),
    "exp": _of_alpha_bar(lambda u: float(np.exp(-12.0 * u))),
    "sigmoid": lambda n, start, end: torch.linspace(-6, 6, n).sigmoid() * (end - start) + start,
    "laplace": _laplace,
}
