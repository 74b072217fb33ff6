"""Orders of convergence on a closed-form problem: the exact score of a mixture of Gaussians.

`python -m benchmarks.convergence` draws docs/images/convergence.png; the tests measure slopes with the same problem.
"""

from __future__ import annotations

import numpy as np
import torch

from diffkern import backends
from diffkern.ops import solver_step
from diffkern.solvers import StepProgram, Transitions, chain

FIRST, LAST = -8.0, 2.0  # λ = log(α/σ) at both ends: σ = 0.9999998 and 0.13 of a variance-preserving state
WEIGHTS, MEANS, STDS = np.array([0.3, 0.5, 0.2]), np.array([-1.0, 0.4, 1.3]), np.array([0.45, 0.35, 0.5])
STARTS = np.linspace(-2.0, 2.0, 17)  # x at λ = FIRST, where it is nearly unit noise
PLOTTED = (16, 24, 32, 48, 64, 96, 128, 192, 256)


def levels(lambdas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(α, σ) with α² + σ² = 1 and log(α/σ) = `lambdas`."""
    return 1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas))


def denoise(x: np.ndarray, lam: float) -> np.ndarray:
    """E[x0 | x] where x = α·x0 + σ·ε and x0 has the mixture's distribution."""
    alpha, sigma = levels(np.float64(lam))
    variance = alpha**2 * STDS**2 + sigma**2
    residual = x[..., None] - alpha * MEANS
    exponent = np.log(WEIGHTS) - 0.5 * np.log(variance) - residual**2 / (2 * variance)
    posterior = np.exp(exponent - exponent.max(-1, keepdims=True))
    posterior /= posterior.sum(-1, keepdims=True)
    return (posterior * (MEANS + alpha * STDS**2 / variance * residual)).sum(-1)


def exact(first: float = FIRST, last: float = LAST) -> np.ndarray:
    """x at λ = `last` of the probability-flow ODE from STARTS at `first`, to about 1e-12."""
    from scipy.integrate import solve_ivp

    def velocity(lam: float, x: np.ndarray) -> np.ndarray:
        # d(x/σ)/dλ = e^λ·x0 (Lu et al. 2022, arXiv 2211.01095, eq. 7), with dσ/dλ = −α²·σ.
        alpha, _ = levels(np.float64(lam))
        return alpha * denoise(x, lam) - alpha**2 * x

    solution = solve_ivp(velocity, (first, last), STARTS, method="DOP853", rtol=1e-13, atol=1e-13)
    return np.asarray(solution.y[:, -1])


def grid(steps: int, prediction: str = "eps") -> Transitions:
    """`steps` rows from FIRST to LAST, λ evenly; the network is told λ."""
    lambdas = np.linspace(FIRST, LAST, steps + 1)
    return chain(*levels(lambdas), lambdas[:-1], prediction)


def network(x: np.ndarray, lam: float) -> np.ndarray:
    """The exact ε."""
    alpha, sigma = levels(np.float64(lam))
    return (x - alpha * denoise(x, lam)) / sigma


def run(program: StepProgram) -> np.ndarray:
    """x after the last row, by `solver_step` in float64 on the reference backend."""
    x = torch.from_numpy(STARTS.reshape(1, 1, -1))
    slots = torch.full((program.num_slots, *x.shape), torch.nan, dtype=torch.float64) if program.num_slots else None
    x_in = x
    with backends.use_backend("reference"):
        for row, lam in enumerate(program.times):
            output = torch.from_numpy(network(x_in.numpy(), float(lam))) if program.calls_network[row] else x
            step = solver_step(x, output, program, row, slots=slots)
            x, x_in = (step, step) if isinstance(step, torch.Tensor) else step
    return x.numpy().reshape(-1)
