"""Transitions: what every row of a solver leads from and to, whatever the process and its scaling are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffkern.process import FlowProcess, GaussianProcess
from diffkern.solvers.prediction import prediction_columns, x0_columns

Process = GaussianProcess | FlowProcess


@dataclass(frozen=True, eq=False)
class Transitions:
    """Row i leads from x = alpha·x0 + sigma·ε to x' = alpha_next·x0 + sigma_next·ε, ε unit noise; float64 (R,) each.

    `times` is what the network is given; from its output m follow x0 = a_x·x + a_m·m and ε = e_x·x + e_m·m. The rows of
    a chain follow each other (alpha_next[i] = alpha[i+1]), which multistep solvers need; single steps may be any.

    The scale of x is free: (√ᾱ, √(1−ᾱ)) for a variance-preserving state, (1, σ) for a variance-exploding one, which
    diffusers' Euler and Heun keep, (1−s, s) for flow matching. A solver is the same in all of them.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    alpha_next: np.ndarray
    sigma_next: np.ndarray
    times: np.ndarray
    a_x: np.ndarray
    a_m: np.ndarray
    e_x: np.ndarray
    e_m: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.times)

    @property
    def log_snr(self) -> np.ndarray:
        """λ = log(alpha/sigma), half the logarithm of the signal-to-noise ratio; ∞ at σ = 0, −∞ at α = 0."""
        return _log_ratio(self.alpha, self.sigma)

    @property
    def log_snr_next(self) -> np.ndarray:
        return _log_ratio(self.alpha_next, self.sigma_next)

    def check_chain(self) -> None:
        """ValueError unless each row begins where the one before it ends."""
        for name in ("alpha", "sigma"):
            begins, ends = getattr(self, name)[1:], getattr(self, f"{name}_next")[:-1]
            off = np.flatnonzero(~np.isclose(begins, ends, rtol=1e-9, atol=0))
            if off.size:
                row = off[0] + 1
                raise ValueError(
                    f"row {row} of the Transitions begins at {name} = {begins[row - 1]}, but the one before it ends at "
                    f"{ends[row - 1]}; this solver needs rows that follow each other, as `chain` makes them"
                )

    def x0_columns(self) -> dict[str, np.ndarray]:
        """The columns a_x and a_m of a program."""
        return {"a_x": self.a_x, "a_m": self.a_m}


def chain(alpha: ArrayLike, sigma: ArrayLike, times: ArrayLike, prediction: str) -> Transitions:
    """The transitions through the levels (alpha, sigma), each (R+1,), from the first to the last.

    The network, called at the first R with `times` (R,), predicts "eps", "x0", "v" or "flow".
    Raises ValueError for another prediction, and where x0 cannot be had from it.
    """
    a, s = np.asarray(alpha, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    return single_steps(a[:-1], s[:-1], a[1:], s[1:], times, prediction)


def single_steps(
    alpha: ArrayLike, sigma: ArrayLike, alpha_next: ArrayLike, sigma_next: ArrayLike, times: ArrayLike, prediction: str
) -> Transitions:
    """Transitions, each (R,), that need not follow each other; see :func:`chain`."""
    a, s, a_next, s_next, t = (
        np.asarray(values, dtype=np.float64) for values in (alpha, sigma, alpha_next, sigma_next, times)
    )
    return Transitions(a, s, a_next, s_next, t, *prediction_columns(a, s, prediction))


def transitions(process: Process | Transitions) -> Transitions:
    """The steps of `process` from t = T−1 to 0 and on to x0 itself; Transitions are returned as they are.

    Raises ValueError where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    if isinstance(process, Transitions):
        return process
    if isinstance(process, FlowProcess):
        sigma = np.append(process.sigmas[::-1], 0.0)
        return chain(1.0 - sigma, sigma, process.timestep_map[::-1], process.prediction)
    abar, abar_prev = process.alphas_cumprod[::-1], process.alphas_cumprod_prev[::-1]
    columns = x0_columns(process)
    return Transitions(
        np.sqrt(abar),
        np.sqrt(1.0 - abar),
        np.sqrt(abar_prev),
        np.sqrt(1.0 - abar_prev),
        process.timestep_map[::-1].astype(np.float64),
        columns["a_x"],
        columns["a_m"],
        *(table[::-1] for table in process.conversion(process.prediction, "eps")),
    )


def _log_ratio(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)
