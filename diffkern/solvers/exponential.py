"""The functions in which exponential integrators are written."""

from __future__ import annotations

import math

import numpy as np


def phi(k: int, z: np.ndarray) -> np.ndarray:
    """φ_k(z) = Σ_n z^n/(n+k)!, float64 of z's shape: φ_0 = e^z, φ_{k+1} = (φ_k − 1/k!)/z.

    (Hochbruck & Ostermann 2010, Exponential integrators, eq. 2.11.) From the series where |z| < 1, since the recursion
    cancels there.
    """
    small = np.abs(z) < 1
    near, far = np.where(small, z, 0.0), np.where(small, 1.0, z)
    series = np.zeros_like(z)
    for n in reversed(range(20)):
        series = series * near + 1.0 / math.factorial(n + k)
    direct = np.exp(far)
    for j in range(k):
        direct = (direct - 1.0 / math.factorial(j)) / far
    return np.where(small, series, direct)
