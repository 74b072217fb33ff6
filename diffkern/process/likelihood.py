"""The part of the variational bound that no network decides: how far x_T is from the noise that sampling starts at."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def prior_bits_per_dim(x0_mean_square: ArrayLike, alphas_cumprod: float) -> np.ndarray:
    """L_T = KL(q(x_T | x0) ‖ N(0, I)) of each image in bits per dimension, float64 (N,).

    q(x_T | x0) = N(√ᾱ_T·x0, (1 − ᾱ_T)·I), so that per dimension (Ho et al. 2020, arXiv 2006.11239, eq. 5; in bits as in
    Nichol & Dhariwal 2021, arXiv 2102.09672)

        L_T = ½·(ᾱ_T·mean(x0²) − ᾱ_T − log(1 − ᾱ_T)) / log 2.

    `x0_mean_square` (N,) holds mean(x0²) over each image's elements, `alphas_cumprod` is ᾱ_T, the process's last one.
    No rounding is felt where ᾱ_T is tiny and the term almost 0.

    Raises ValueError for a negative or non-finite mean square, and for ᾱ_T outside [0, 1).
    """
    mean_square = np.asarray(x0_mean_square, dtype=np.float64)
    if not (np.isfinite(mean_square) & (mean_square >= 0)).all():
        raise ValueError("x0_mean_square must hold finite numbers, 0 or more")
    if not 0 <= alphas_cumprod < 1:
        raise ValueError(f"alphas_cumprod is {alphas_cumprod}; it must be in [0, 1)")
    entropy = -math.log1p(-alphas_cumprod) - alphas_cumprod
    return 0.5 * (alphas_cumprod * mean_square + entropy) / math.log(2.0)
