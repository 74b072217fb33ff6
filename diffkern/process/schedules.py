"""Noise schedules: β_t for t = 0 … T−1, float64.

Every function returns a float64 array (T,) with values in (0, 1]. β_t is the variance of the step
q(x_t | x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

SCHEDULES = ("linear", "scaled_linear", "cosine")


def make_betas(
    schedule: str, num_timesteps: int, *, beta_start: float | None = None, beta_end: float | None = None
) -> np.ndarray:
    """β (T,) of the schedule called `schedule`, as a configuration file names it.

    `schedule` is "linear", "scaled_linear" or "cosine". The end points belong to the first two and default to
    those of :func:`linear_betas` and :func:`scaled_linear_betas`.

    Raises ValueError for an unknown name, for end points given to "cosine", and for betas outside (0, 1].
    """
    if schedule == "linear":
        return linear_betas(num_timesteps, beta_start, beta_end)
    if schedule == "scaled_linear":
        return scaled_linear_betas(
            num_timesteps,
            0.00085 if beta_start is None else beta_start,
            0.012 if beta_end is None else beta_end,
        )
    if schedule == "cosine":
        if beta_start is not None or beta_end is not None:
            raise ValueError("beta_start and beta_end belong to the linear schedules; 'cosine' takes neither")
        return cosine_betas(num_timesteps)
    raise ValueError(f"schedule is {schedule!r}; it may be one of {', '.join(map(repr, SCHEDULES))}")


def linear_betas(num_timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> np.ndarray:
    """β evenly spaced (Ho et al. 2020, arXiv 2006.11239, section 4).

    End points that are not given are 1e-4·1000/T and 0.02·1000/T, so that ᾱ_T hardly depends on T (as OpenAI's
    code has it; below T = 20 the last β would pass 1 and is refused). Give both to have them used as they are.
    """
    _check_num_timesteps(num_timesteps)
    scale = 1000 / num_timesteps
    start = scale * 1e-4 if beta_start is None else beta_start
    end = scale * 0.02 if beta_end is None else beta_end
    return check_betas(np.linspace(start, end, num_timesteps, dtype=np.float64))


def scaled_linear_betas(num_timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> np.ndarray:
    """β whose square roots are evenly spaced (latent diffusion, arXiv 2112.10752; its end points by default)."""
    _check_num_timesteps(num_timesteps)
    if not (beta_start >= 0 and beta_end >= 0):
        raise ValueError(f"beta_start and beta_end are {beta_start} and {beta_end}; both must be in (0, 1]")
    return check_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2)


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """β of ᾱ(u) = cos²(π/2·(u + 0.008)/1.008), capped at 0.999 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
    return betas_for_alpha_bar(num_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def betas_for_alpha_bar(num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999) -> np.ndarray:
    """β_t = min(1 − ᾱ((t+1)/T)/ᾱ(t/T), max_beta) for a function ᾱ on [0, 1] that falls from 1 towards 0."""
    _check_num_timesteps(num_timesteps)
    at = np.array([alpha_bar(t / num_timesteps) for t in range(num_timesteps + 1)], dtype=np.float64)
    return check_betas(np.minimum(1 - at[1:] / at[:-1], max_beta))


def check_betas(betas: ArrayLike) -> np.ndarray:
    """A float64 copy (T,) of `betas`; ValueError unless it is 1-D, not empty, finite and within (0, 1].

    2⁻⁵⁴ and less is refused as well: 1 − β rounds to 1 in float64, and the tables would divide by 1 − ᾱ = 0.
    """
    array = np.array(betas, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"betas have shape {array.shape}; they must be 1-D and not empty")
    bad = np.flatnonzero(~((1 - array < 1) & (array <= 1)))
    if bad.size:
        raise ValueError(f"betas[{bad[0]}] is {array[bad[0]]}; every beta must be in (2**-54, 1]")
    return array


def _check_num_timesteps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 1")
