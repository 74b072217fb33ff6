"""Which timesteps a scheduler visits: diffusers' three spacings (Lin et al. 2023, arXiv 2305.08891, table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SPACINGS = ("leading", "linspace", "trailing")


def check_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    """ValueError unless a whole number of steps in [1, T] is asked for."""
    whole = isinstance(num_inference_steps, int | np.integer) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps!r}; "
            f"it must be an int in [1, {num_train_timesteps}], the steps that the model was trained with"
        )


def spaced_timesteps(config: Any, num_inference_steps: int) -> np.ndarray:
    """int64 (num_inference_steps,), falling, as config.timestep_spacing says.

    Raises ValueError for a number of steps outside [1, T] and for an unknown spacing.
    """
    return fractional_timesteps(config, num_inference_steps).round().astype(np.int64)


def fractional_timesteps(config: Any, num_inference_steps: int, total: int | None = None) -> np.ndarray:
    """As `spaced_timesteps`, float64, but "linspace" goes in even steps. `total` is T; None: the config's."""
    total = total or config.num_train_timesteps
    check_steps(num_inference_steps, total)
    match config.timestep_spacing:
        case "linspace":
            rising = np.linspace(0, total - 1, num_inference_steps)
        case "leading":
            rising = np.arange(num_inference_steps, dtype=np.float64) * (total // num_inference_steps)
            rising += config.steps_offset
        case "trailing":
            return np.round(np.arange(total, 0, -total / num_inference_steps)) - 1
        case other:
            raise ValueError(f"timestep_spacing is {other!r}; it may be one of {', '.join(map(repr, SPACINGS))}")
    return rising[::-1]


def custom_timesteps(timesteps: Sequence[float], num_train_timesteps: int) -> np.ndarray:
    """A user's timesteps, float64 (steps,); ValueError unless there are some, all in [0, T)."""
    given = np.asarray(timesteps, dtype=np.float64)
    if given.ndim != 1 or given.size == 0 or not ((given >= 0) & (given < num_train_timesteps)).all():
        raise ValueError(
            f"timesteps are {given.tolist()}; they must be one or more numbers in [0, {num_train_timesteps})"
        )
    return given
