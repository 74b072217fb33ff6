"""Loss weights of the timesteps, float64: how much the error at each level of noise counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffkern.process.gaussian import GaussianProcess


class _Weights(NamedTuple):
    """`table` (T,) multiplies the squared error of `prediction`, "eps" or "x0": the one that is finite at SNR = 0."""

    prediction: str
    table: np.ndarray


def loss_weights(process: GaussianProcess, name: str, **options: float) -> np.ndarray:
    """float64 (T,): what the squared error of the process's own prediction is multiplied with at each timestep.

    With SNR_t = ᾱ_t/(1−ᾱ_t) and λ = log SNR, `name` and its options are

    - "min_snr": min(SNR, gamma) on x0, gamma = 5 (Hang et al. 2023, arXiv 2303.09556, section 3.4).
    - "soft_min_snr": SNR·gamma/(SNR + gamma) on x0, gamma = 4 (Crowson et al. 2024, arXiv 2401.11605): its smooth form,
      half the harmonic mean of the two. gamma = 4 is 1/σ_data² for σ_data = 0.5.
    - "p2": 1/(k + SNR)^gamma on eps, k = 1, gamma = 1 (Choi et al. 2022, arXiv 2204.00227, eq. 8, on the simple loss).
    - "edm": (σ̂² + sigma_data²)/(σ̂·sigma_data)² on x0, σ̂² = 1/SNR, sigma_data = 0.5 (Karras et al. 2022,
      arXiv 2206.00364, table 1).
    - "laplace": p(λ)/q(λ) on eps, p the Laplace density of `loc` = 0 and `scale` = 0.5, q the density in which uniform
      timesteps fall (Hang et al. 2024, arXiv 2407.03297): a schedule's steps count as if they had been drawn from p.
      Per step it is T times p's probability between the midpoints to both neighbours in λ, the first and the last step
      reaching as far outwards as inwards; so the mean over the steps is 1, less what p has beyond the schedule's ends.

    Weights keep the scale of these formulas. Another prediction m has the error x0 − x̂0 = κ·(m − m̂), so that its
    weight is κ² times x0's: κ² is 1/SNR for "eps", 1/(1 + SNR) for "v", (1−ᾱ)/(√ᾱ + √(1−ᾱ))² for "flow" and 1/coef1²
    for "x_prev". At ᾱ = 0 (zero terminal SNR) that is taken in the limit: "min_snr" on eps is 1 there.

    Raises ValueError for an unknown name, an option that the weighting does not have or that is out of its range
    (all but loc and p2's gamma are positive, p2's gamma is at least 0), and a weight that is infinite, as "edm" on eps
    at ᾱ = 0.
    """
    if name not in _WEIGHTINGS:
        raise ValueError(f"weighting is {name!r}; it may be one of {', '.join(map(repr, WEIGHTINGS))}")
    function, defaults = _WEIGHTINGS[name]
    for option, value in options.items():
        if option not in defaults:
            raise ValueError(f"{option} is {value}; the weighting {name!r} takes {', '.join(defaults)}")
        _check_option(name, option, value)
    weights = function(process, **defaults | options)
    table = _converted(process, weights)
    infinite = np.flatnonzero(~np.isfinite(table))
    if infinite.size:
        raise ValueError(
            f"the weighting {name!r} of the prediction {process.prediction!r} is infinite at t = {infinite[0]}, "
            f"where SNR is {_snr(process)[infinite[0]]:g}"
        )
    return table


def _snr(process: GaussianProcess) -> np.ndarray:
    return process.alphas_cumprod / (1.0 - process.alphas_cumprod)


def _min_snr(process: GaussianProcess, gamma: float) -> _Weights:
    return _Weights("eps", gamma / np.maximum(_snr(process), gamma))


def _soft_min_snr(process: GaussianProcess, gamma: float) -> _Weights:
    return _Weights("eps", gamma / (_snr(process) + gamma))


def _p2(process: GaussianProcess, k: float, gamma: float) -> _Weights:
    return _Weights("eps", (k + _snr(process)) ** -gamma)


def _edm(process: GaussianProcess, sigma_data: float) -> _Weights:
    return _Weights("x0", _snr(process) + 1.0 / sigma_data**2)


def _laplace(process: GaussianProcess, loc: float, scale: float) -> _Weights:
    if process.num_timesteps < 2:
        raise ValueError(
            "the weighting 'laplace' needs a process of 2 or more steps: one alone has no density in log SNR"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (np.log(_snr(process)) - loc) / scale  # falls; −∞ at the end for zero terminal SNR
        middles = (z[1:] + z[:-1]) / 2
        last = 2 * z[-1] - middles[-1] if np.isfinite(z[-1]) else -math.inf
        edges = np.concatenate([[2 * z[0] - middles[0]], middles, [last]])
        one_side = edges[:-1] * edges[1:] > 0
    # From the tails, which lose nothing where the distribution function is nearly 1.
    tails = np.exp(-np.abs(edges)) / 2
    between = np.where(one_side, np.abs(tails[:-1] - tails[1:]), 1.0 - tails[:-1] - tails[1:])
    return _Weights("eps", process.num_timesteps * between)


def _converted(process: GaussianProcess, weights: _Weights) -> np.ndarray:
    """The weights of the process's own prediction; none of the factors is 0 times infinity at ᾱ = 0."""
    signal, noise = process.alphas_cumprod, 1.0 - process.alphas_cumprod
    if weights.prediction == process.prediction:
        return weights.table
    of_eps = weights.prediction == "eps"
    with np.errstate(divide="ignore", over="ignore"):
        match process.prediction:
            case "eps":
                return weights.table * (noise / signal)
            case "v":
                return weights.table * (signal if of_eps else noise)
            case "flow":
                both = (process.sqrt_alphas_cumprod + process.sqrt_one_minus_alphas_cumprod) ** 2
                return weights.table * ((signal if of_eps else noise) / both)
        of_x0 = weights.table * (signal / noise) if of_eps else weights.table
        return of_x0 if process.prediction == "x0" else of_x0 / process.posterior_mean_coef1**2


def _check_option(name: str, option: str, value: float) -> None:
    if option == "loc":
        allowed, holds = "finite", math.isfinite(value)
    elif (name, option) == ("p2", "gamma"):
        allowed, holds = "0 or more and finite", 0 <= value < math.inf
    else:
        allowed, holds = "positive and finite", 0 < value < math.inf
    if not holds:
        raise ValueError(f"{option} of the weighting {name!r} is {value}; it must be {allowed}")


_WEIGHTINGS: dict[str, tuple[Callable[..., _Weights], dict[str, float]]] = {
    "min_snr": (_min_snr, {"gamma": 5.0}),
    "soft_min_snr": (_soft_min_snr, {"gamma": 4.0}),
    "p2": (_p2, {"k": 1.0, "gamma": 1.0}),
    "edm": (_edm, {"sigma_data": 0.5}),
    "laplace": (_laplace, {"loc": 0.0, "scale": 0.5}),
}
WEIGHTINGS = tuple(_WEIGHTINGS)
