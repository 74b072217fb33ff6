"""Noise between steps: Karras et al. 2022, arXiv 2206.00364, algorithm 2, and where a table puts it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffkern.process import GaussianProcess, timesteps_of_sigmas
from diffkern.solvers.transitions import Transitions, chain, transitions


@dataclass(frozen=True)
class Churn:
    """How much noise comes in before each step: from σ̂ = σ/α in [s_min, s_max] to σ̂·(1+γ),

        γ = min(s_churn/R, √2 − 1),   R the number of steps,

    the noise being s_noise times unit normals. None of it by default.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = np.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_min", "s_noise"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and at least 0")
        if not self.s_min <= self.s_max:
            raise ValueError(f"s_max is {self.s_max}; it must be at least s_min, {self.s_min}")

    def gamma(self, sigmas: np.ndarray, steps: int) -> np.ndarray:
        """γ of each level of sigmas, of its shape; 0 where σ̂ is infinite."""
        there = (sigmas >= self.s_min) & (sigmas <= self.s_max) & np.isfinite(sigmas)
        return np.where(there, min(self.s_churn / steps, np.sqrt(2.0) - 1.0), 0.0)


NO_CHURN = Churn()


def churned(process: GaussianProcess | Transitions, churn: Churn, full: GaussianProcess | None) -> Transitions:
    """The steps of `process` with those upwards in noise between them, where `churn` puts any.

    The network is called at the levels that they reach, √ᾱ·x0 + √(1−ᾱ)·ε with ᾱ = 1/(1+σ̂²), with the fractional
    timesteps that have them in `full`, the process that `process` was respaced from (T−1 where none is so noisy).

    Raises ValueError for Transitions, which say neither, if there is anything to do.
    """
    steps = transitions(process)
    if churn.s_churn == 0:
        return steps
    if isinstance(process, Transitions):
        raise ValueError("s_churn is above 0; to churn Transitions, let them have rows that lead to more noise")
    with np.errstate(divide="ignore"):
        levels = steps.sigma / steps.alpha
    gamma = churn.gamma(levels, steps.num_rows)
    before = np.flatnonzero(gamma > 0)
    hatted = levels[before] * (1.0 + gamma[before])
    source = process if full is None else full
    with np.errstate(divide="ignore"):
        table = np.sqrt((1.0 - source.alphas_cumprod) / source.alphas_cumprod)
    position = timesteps_of_sigmas(hatted, table)
    times = np.interp(position, np.arange(len(table)), source.timestep_map)
    alpha = np.insert(steps.alpha, before + 1, 1.0 / np.sqrt(1.0 + hatted**2))
    sigma = np.insert(steps.sigma, before + 1, hatted / np.sqrt(1.0 + hatted**2))
    return chain(
        np.append(alpha, steps.alpha_next[-1]),
        np.append(sigma, steps.sigma_next[-1]),
        np.insert(steps.times, before + 1, times),
        process.prediction,
    )


def upwards(steps: Transitions) -> np.ndarray:
    """Which rows, bool (R,), lead to more noise, σ'/α' > σ/α: there is nothing in them for a network to do."""
    before, after = steps.sigma * steps.alpha_next, steps.sigma_next * steps.alpha
    return after > before * (1.0 + 1e-12)


def eps_columns(steps: Transitions, clipped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, m, x0), each (R,), whose combination is ε: as the network has it, or as the clipped x0 does."""
    zero = np.zeros(steps.num_rows)
    if clipped:
        return 1.0 / steps.sigma, zero, -steps.alpha / steps.sigma
    return steps.e_x, steps.e_m, zero


def fold_noise(
    named: dict[str, np.ndarray], up: np.ndarray, scale: np.ndarray, noise: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(columns, which rows they are, which of those call the network) of a table (R,) with rows `up`.

    Such a row is x' = scale·x + noise·z. It is made part of the row before, whose x' it changes; the first row, and
    one after another of its kind, stays, without a call of the network.
    """
    folded = np.flatnonzero(up & ~np.append(True, up[:-1]))
    alone = np.setdiff1d(np.flatnonzero(up), folded)
    named = {name: column.copy() for name, column in named.items()}
    named.setdefault("c_z", np.zeros(len(up)))
    for name, column in named.items():
        column[alone] = 0
        if name.startswith("c_"):
            column[folded - 1] *= scale[folded]
    named["c_x"][alone] = scale[alone]
    named["c_z"][alone] = noise[alone]
    named["c_z"][folded - 1] = noise[folded]
    rows = np.setdiff1d(np.arange(len(up)), folded)
    return {name: column[rows] for name, column in named.items()}, rows, ~up[rows]


def bridge(steps: Transitions, s_noise: float) -> tuple[np.ndarray, np.ndarray]:
    """(scale, noise), each (R,), with which x' = scale·x + noise·z leads a row upwards."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = steps.alpha_next / steps.alpha
        return scale, s_noise * np.sqrt(np.maximum(steps.sigma_next**2 - (scale * steps.sigma) ** 2, 0.0))
