"""DPM-Solver++(2M) as a StepProgram: Lu et al. 2022, arXiv 2211.01095, algorithm 2."""

from __future__ import annotations

from diffkern.process import GaussianProcess
from diffkern.solvers.dpm_multistep import dpm_multistep
from diffkern.solvers.program import StepProgram
from diffkern.solvers.transitions import Transitions


def dpmpp_2m(
    process: GaussianProcess | Transitions,
    *,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    threshold: tuple[float, float] | None = None,
) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0. With α = √ᾱ, σ = √(1−ᾱ), λ = log(α/σ), the row for t is

        x_{t−1} = σ_{t−1}/σ_t·x_t − α_{t−1}·(e^{−h_t} − 1)·D,   D = x0 + (x0 − x0')/(2r)
        r = h_{t+1}/h_t,   h_t = λ_{t−1} − λ_t

    where x0 is clipped and x0' is the row before's, which slot 0 remembers. :func:`dpm_multistep` of order 2.
    Rows where 1/r is 0 or not finite are of first order, D = x0, steps of DDIM with η = 0: the first; the one after
    ᾱ = 0, since λ was −∞ there; and always the last, which leads to λ = ∞ and returns x0 (as diffusers'
    final_sigmas_type "zero"). No row adds noise, and of a network that learns its variance only the first C channels
    are used. Sample in fewer steps from a respaced process.

    Raises ValueError where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    return dpm_multistep(process, orders=2, clip=clip, threshold=threshold)
