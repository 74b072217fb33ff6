"""Noise levels for a solver to visit: σ̂ = σ/α, falling, float64 (n,), and the timesteps that belong to them.

σ̂_t = √((1−ᾱ_t)/ᾱ_t) of a discrete process; a level between two of its timesteps belongs to a fractional one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

SIGMA_SPACINGS = ("linear", "karras", "exponential", "polyexponential", "beta", "lu")


def space_sigmas(name: str, n: int, sigma_min: float, sigma_max: float, **options: float) -> np.ndarray:
    """n levels from sigma_max to sigma_min, both included (n = 1: sigma_max alone), spaced as `name` says.

    - "linear": evenly.
    - "karras": σ^(1/rho) evenly, rho = 7 unless given (Karras et al. 2022, arXiv 2206.00364, eq. 5).
    - "exponential": log σ evenly; "lu": λ = −log σ evenly, which is the same (Lu et al. 2022, arXiv 2211.01095).
    - "polyexponential": log σ as the rho-th power of an even ramp, rho = 1 unless given (k-diffusion).
    - "beta": σ at the quantiles of the Beta(alpha, beta) distribution, 0.6 each unless given (arXiv 2407.12173). Needs
      SciPy.

    Raises ValueError for an unknown name, n below 1, and unless 0 < sigma_min <= sigma_max (sigma_min may be 0 for
    "linear" and "karras" and "beta").
    """
    if name not in SIGMA_SPACINGS:
        raise ValueError(f"spacing is {name!r}; it may be one of {', '.join(map(repr, SIGMA_SPACINGS))}")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    least_allowed = sigma_min > 0 or (sigma_min == 0 and name in ("linear", "karras", "beta"))
    if not (least_allowed and sigma_min <= sigma_max < np.inf):
        raise ValueError(f"sigma_min and sigma_max are {sigma_min} and {sigma_max}; they must be positive and in order")
    ramp = np.linspace(0.0, 1.0, n)
    if name == "linear":
        return sigma_max + ramp * (sigma_min - sigma_max)
    if name == "karras":
        power = 1.0 / options.get("rho", 7.0)
        return (sigma_max**power + ramp * (sigma_min**power - sigma_max**power)) ** (1.0 / power)
    if name == "beta":
        quantiles = _beta_quantiles(1.0 - ramp, options.get("alpha", 0.6), options.get("beta", 0.6))
        return sigma_min + quantiles * (sigma_max - sigma_min)
    remaining = (1.0 - ramp) ** options.get("rho", 1.0) if name == "polyexponential" else 1.0 - ramp
    return np.exp(np.log(sigma_min) + remaining * (np.log(sigma_max) - np.log(sigma_min)))


def timesteps_of_sigmas(sigmas: ArrayLike, table: ArrayLike) -> np.ndarray:
    """The fractional timesteps, float64, at which log σ̂, interpolated linearly in `table` (T,), rising, has `sigmas`.

    Levels outside the table belong to its first or last timestep. In `table`, σ̂ = 0 counts as the smallest positive
    float64, so that its logarithm can be taken.
    """
    levels, known = (
        np.log(np.maximum(np.asarray(s, dtype=np.float64), np.finfo(np.float64).tiny)) for s in (sigmas, table)
    )
    return np.interp(levels, known, np.arange(known.size, dtype=np.float64))


def _beta_quantiles(p: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise ImportError('the spacing "beta" needs SciPy: pip install scipy') from error
    return np.asarray(distribution.ppf(p, alpha, beta), dtype=np.float64)
