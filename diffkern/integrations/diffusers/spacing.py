"""Which timesteps a scheduler visits: diffusers' three spacings (Lin et al. 2023, arXiv 2305.08891, table 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

SPACINGS = ("leading", "linspace", "trailing")


def check_steps(num_inference_steps: int | None, num_train_timesteps: int) -> int:
    """num_inference_steps itself; ValueError unless it is a whole number in [1, T]."""
    number = num_inference_steps
    if isinstance(number, int | np.integer) and not isinstance(number, bool) and 1 <= number <= num_train_timesteps:
        return int(number)
    raise ValueError(
        f"num_inference_steps is {number!r}; "
        f"it must be an int in [1, {num_train_timesteps}], the steps that the model was trained with"
    )


def spaced_timesteps(config: Any, num_inference_steps: int | None, spacings: tuple[str, ...] = SPACINGS) -> np.ndarray:
    """int64 (num_inference_steps,), falling, as config.timestep_spacing says.

    Raises ValueError for a number of steps outside [1, T] and for an unknown spacing.
    """
    return fractional_timesteps(config, num_inference_steps, spacings=spacings).round().astype(np.int64)


def fractional_timesteps(
    config: Any, num_inference_steps: int | None, total: int | None = None, spacings: tuple[str, ...] = SPACINGS
) -> np.ndarray:
    """As `spaced_timesteps`, float64, but "linspace" goes in even steps. `total` is T; None: the config's."""
    total, spacing = total or config.num_train_timesteps, config.timestep_spacing
    number = check_steps(num_inference_steps, total)
    if spacing not in spacings:
        raise ValueError(f"timestep_spacing is {spacing!r}; it may be one of {', '.join(map(repr, spacings))}")
    if spacing == "trailing":
        # For some numbers, 29 of 100, rounding lets this arange go one step too far, to timestep −1.
        return np.round(np.arange(total, 0, -total / number)[:number]) - 1
    if spacing == "linspace":
        return np.linspace(0, total - 1, number)[::-1]
    return np.arange(number, dtype=np.float64)[::-1] * (total // number) + config.steps_offset


def custom_timesteps(timesteps: Any, num_train_timesteps: int, *, fractions: bool = False) -> np.ndarray:
    """`timesteps`, a list, array or tensor of numbers falling within [0, T − 1]: whole ones, int64, or with `fractions`
    any, float64.

    Raises ValueError for anything else.
    """
    given = np.asarray(timesteps.detach().cpu() if isinstance(timesteps, Tensor) else timesteps)
    last, kind = num_train_timesteps - 1, "numbers" if fractions else "whole numbers"
    known = given.ndim == 1 and given.size > 0 and given.dtype.kind in "iuf" and bool(np.isfinite(given).all())
    known = known and (fractions or bool((given == np.floor(given)).all()))
    if not known or given[0] > last or given[-1] < 0 or (given[1:] >= given[:-1]).any():
        raise ValueError(f"timesteps are {timesteps}; they must be {kind} falling in [0, {last}]")
    return given.astype(np.float64 if fractions else np.int64)
