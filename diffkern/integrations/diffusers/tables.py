"""β and ᾱ of diffusers' configurations, float64: diffusers' own are float32, good to 1e-5 at small t."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.process import betas_for_alpha_bar

COSINE = "squaredcos_cap_v2"


def make_betas(config: Any, schedules: tuple[str, ...]) -> np.ndarray:
    """β (T,) of a scheduler's config, whose class knows `schedules`; any numbers, as diffusers allows (β of 2 too).

    Raises NotImplementedError, as diffusers does, for another beta_schedule.
    """
    num_timesteps = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"trained_betas have shape {betas.shape}; they must be 1-D and not empty")
    elif config.beta_schedule not in schedules:
        raise NotImplementedError(f"beta_schedule is {config.beta_schedule!r}; it may be one of {', '.join(schedules)}")
    else:
        betas = _SCHEDULES[config.beta_schedule](num_timesteps, config.beta_start, config.beta_end)
    return zero_terminal_snr(betas) if getattr(config, "rescale_betas_zero_snr", False) else betas


class EndLevel:
    """Attribute of a scheduler: ᾱ past an end of the process, to which users may assign another number.

    Users read a float32 tensor (); `number` is the float64 one that programs are made of.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.stored = f"_{name}"

    def number(self, scheduler: Any) -> float:
        return vars(scheduler)[self.stored][0]

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        return self if scheduler is None else vars(scheduler)[self.stored][1]

    def __set__(self, scheduler: Any, value: float | Tensor) -> None:
        number = float(value)
        known = vars(scheduler).get(self.stored)
        # What was read from here, perhaps moved to a device, is not to lose the digits that float32 has not.
        if known is not None and np.float32(known[0]) == np.float32(number):
            number = known[0]
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        vars(scheduler)[self.stored] = (number, tensor)
        scheduler._forget_programs()


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """β with √ᾱ shifted and scaled so that the last ᾱ is 0 (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    return 1.0 - np.append(abar[0], abar[1:] / abar[:-1])


def _cosine(num_timesteps: int, start: float, end: float) -> np.ndarray:
    return betas_for_alpha_bar(num_timesteps, lambda u: float(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2))


def _exp(num_timesteps: int, start: float, end: float) -> np.ndarray:
    return betas_for_alpha_bar(num_timesteps, lambda u: float(np.exp(-12.0 * u)))


def _sigmoid(num_timesteps: int, start: float, end: float) -> np.ndarray:
    return start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_timesteps)))


def _laplace(num_timesteps: int, start: float, end: float) -> np.ndarray:
    """ᾱ(u) with a Laplace-distributed log-SNR (Hang & Gu 2024, arXiv 2407.03297), as diffusers reads it."""

    def alpha_bar(u: float) -> float:
        log_snr = -0.5 * np.copysign(1.0, 0.5 - u) * np.log(1.0 - 2.0 * abs(0.5 - u) + 1e-6)
        return float(np.sqrt(1.0 / (1.0 + np.exp(-log_snr))))

    at = np.array([alpha_bar(t / num_timesteps) for t in range(num_timesteps + 1)])
    return np.minimum(1.0 - at[1:] / at[:-1], 0.999)


_SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda n, start, end: np.linspace(start, end, n),
    "scaled_linear": lambda n, start, end: np.linspace(start**0.5, end**0.5, n) ** 2,
    COSINE: _cosine,
    "exp": _exp,
    "sigmoid": _sigmoid,
    "laplace": _laplace,
}


def single_alphas_cumprod(config: Any) -> Tensor:
    """ᾱ, float32 (T,), rounded as diffusers rounds it on the way: for decisions that hang on its last digit.

    With zero terminal SNR the last is 2^−24, as in the schedulers that divide by it.
    """
    steps, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(start, end, steps)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps) ** 2
    else:
        betas = torch.tensor(_SCHEDULES[config.beta_schedule](steps, start, end), dtype=torch.float32)
    abar = torch.cumprod(1 - betas, 0)
    if not config.rescale_betas_zero_snr:
        return abar
    root = abar.sqrt()
    abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    betas = 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return torch.cat([torch.cumprod(1 - betas, 0)[:-1], abar.new_tensor([2.0**-24])])
