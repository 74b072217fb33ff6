"""Integrals of interpolating polynomials: the weights of multistep and singlestep solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# 32 points: exact to rounding for e^u times a cubic over steps as long as 40 in u, from λ = −20 to 20 at once. Sums of
# closed forms (φ functions) lose digits as 1/h³ in short steps; a quadrature does not.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def lagrange_integrals(
    nodes: Sequence[float], start: float, end: float, density: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """w (k,), float64, with w_j the integral from `start` to `end` of density(u)·L_j(u) du.

    L_j is the polynomial of degree k − 1 that is 1 at nodes[j] and 0 at the others, so that Σ w_j·f_j integrates
    density·f with f interpolated through its values at the k nodes, which differ.
    """
    half = (end - start) / 2
    u = start + half * (_POINTS + 1)
    weighted = half * _WEIGHTS * density(u)
    return np.array(
        [
            np.sum(weighted * np.prod([(u - other) / (node - other) for other in nodes if other != node], axis=0))
            for node in nodes
        ]
    )
