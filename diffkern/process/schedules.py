"""Noise schedules: β_t for t = 0 … T−1, float64.

Every function returns a float64 array (T,) with values in (0, 1]. β_t is the variance of the step
q(x_t | x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def make_betas(schedule: str, num_timesteps: int, **options: float | None) -> np.ndarray:
    """β (T,) of the schedule called `schedule`, one of SCHEDULES, as a configuration file names it.

    `options` are those of its function, and None the same as not given: `beta_start` and `beta_end` of "linear",
    "scaled_linear" and "sigmoid_beta"; `start`, `end` and `tau` of "sigmoid".

    Raises ValueError for an unknown name, for an option that the schedule does not take, and for betas outside (0, 1].
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; it may be one of {', '.join(map(repr, SCHEDULES))}")
    function, taken = _SCHEDULES[schedule]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in taken:
            may_be = f"its options are {', '.join(taken)}" if taken else "it has no options"
            raise ValueError(f"the schedule {schedule!r} takes no {name}; {may_be}")
    return function(num_timesteps, **given)


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


def sigmoid_betas(num_timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> np.ndarray:
    """β of ᾱ(u) = (s(end) − s(start + u·(end − start)))/(s(end) − s(start)) with s(v) = 1/(1 + e^(−v/tau)).

    β is capped at 0.999 (Jabri et al. 2022, arXiv 2212.11972, algorithm 1).
    Raises ValueError unless start < end and tau > 0, all finite.
    """
    if not (-math.inf < start < end < math.inf and 0 < tau < math.inf):
        raise ValueError(f"start, end and tau are {start}, {end} and {tau}; start < end and tau > 0 must be finite")
    first, last = _sigmoid(start / tau), _sigmoid(end / tau)
    return betas_for_alpha_bar(
        num_timesteps, lambda u: (last - _sigmoid((start + u * (end - start)) / tau)) / (last - first)
    )


def sigmoid_beta_betas(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """β from beta_start to beta_end along the sigmoid of [−6, 6], which falls short of them by 1/400 of the range.

    Xu et al. 2022, arXiv 2203.02923 (GeoDiff); diffusers' "sigmoid".
    """
    _check_num_timesteps(num_timesteps)
    ramp = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_timesteps)))
    return check_betas(beta_start + ramp * (beta_end - beta_start))


def laplace_betas(num_timesteps: int) -> np.ndarray:
    """β of ᾱ(u) = √(r/(1 + r)), log r = −sgn(½ − u)/2·log(1 − 2·|½ − u| + 1e-6), capped at 0.999.

    log r follows the quantiles of a Laplace distribution with location 0 and scale ½ (Hang et al. 2024,
    arXiv 2407.03297); the margin of 1e-6 keeps the ends finite. The square root is diffusers', the paper's own ᾱ is
    r/(1 + r).
    """

    def alpha_bar(u: float) -> float:
        log_ratio = -0.5 * math.copysign(1.0, 0.5 - u) * math.log(1.0 - 2.0 * abs(0.5 - u) + 1e-6)
        return math.sqrt(_sigmoid(log_ratio))

    return betas_for_alpha_bar(num_timesteps, alpha_bar)


def exp_betas(num_timesteps: int) -> np.ndarray:
    """β of ᾱ(u) = e^(−12·u), the same at every step (diffusers' "exp")."""
    return betas_for_alpha_bar(num_timesteps, lambda u: math.exp(-12.0 * u))


def zero_terminal_snr(betas: ArrayLike) -> np.ndarray:
    """`betas` (T,) changed so that the last ᾱ is 0 and the first stays: Lin et al. 2023, arXiv 2305.08891, alg. 1.

    √ᾱ is shifted and scaled, √ᾱ'_t = (√ᾱ_t − √ᾱ_{T−1})·√ᾱ_0/(√ᾱ_0 − √ᾱ_{T−1}), and β'_{T−1} is exactly 1. A network
    that predicts eps has nothing to say there; use "v" or "x0".

    Raises ValueError for betas outside (0, 1] and for fewer than two.
    """
    given = check_betas(betas)
    if len(given) < 2:
        raise ValueError("betas hold 1 value; zero_terminal_snr needs at least 2, of which the first keeps its ᾱ")
    root = np.sqrt(np.cumprod(1.0 - given))
    alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return check_betas(np.append(given[0], 1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]))


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


def _sigmoid(v: float) -> float:
    return 1.0 / (1.0 + math.exp(-v))


_SCHEDULES: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "linear": (linear_betas, ("beta_start", "beta_end")),
    "scaled_linear": (scaled_linear_betas, ("beta_start", "beta_end")),
    "cosine": (cosine_betas, ()),
    "sigmoid": (sigmoid_betas, ("start", "end", "tau")),
    "sigmoid_beta": (sigmoid_beta_betas, ("beta_start", "beta_end")),
    "laplace": (laplace_betas, ()),
    "exp": (exp_betas, ()),
}
SCHEDULES = tuple(_SCHEDULES)
