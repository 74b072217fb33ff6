"""A diffusion's steps as StepPrograms in which row t is timestep t, so that a tensor of timesteps is one of rows.

Every program has one slot, to which its row writes x0: a step's sample and x0 come from the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffkern.integrations.guided_diffusion.tables import Tables, model_variance, score_to_xstart
from diffkern.integrations.guided_diffusion.types import ModelMeanType, ModelVarType
from diffkern.solvers import StepProgram, step_program

_LEARNED = {ModelVarType.LEARNED: "learned", ModelVarType.LEARNED_RANGE: "learned_range"}
_ROUNDING = 1e-9  # of 1 − ᾱ_{t−1} − σ², relative to 1 − ᾱ_{t−1}


def ancestral(diffusion: Tables, clip: bool) -> StepProgram:
    """x_{t−1} ~ p(x_{t−1} | x_t) (Ho et al. 2020, arXiv 2006.11239, algorithm 2); t = 0 adds no noise.

    `extra` is a classifier's gradient, which moves the mean by σ² times it (Dhariwal & Nichol 2021, arXiv 2105.05233,
    algorithm 1).
    """
    ones = np.ones(len(diffusion.betas))
    named = _x0_columns(diffusion)
    if diffusion.model_mean_type == ModelMeanType.PREVIOUS_X:
        named["c_m"] = ones
    else:
        named["c_0"], named["c_x"] = diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2
    if diffusion.model_var_type in _LEARNED:
        std = named["c_v"] = ones
        if diffusion.model_var_type == ModelVarType.LEARNED_RANGE:
            named["log_var_min"] = diffusion.posterior_log_variance_clipped
            named["log_var_max"] = np.log(diffusion.betas)
    else:
        named["c_e"], log_variance = model_variance(diffusion)
        std = np.exp(log_variance / 2)
    named["c_z"] = np.append(0.0, std[1:])
    return _program(named, clip, _LEARNED.get(diffusion.model_var_type, "fixed"))


def implicit(diffusion: Tables, clip: bool, eta: float, guided: bool) -> StepProgram:
    """DDIM's step (Song et al. 2021, arXiv 2010.02502, eq. 12) with ε derived anew from the clipped x0.

    `guided` programs take a classifier's gradient e as `extra`: ε' = ε − √(1−ᾱ)·e, and x0 is had anew from ε'
    (Dhariwal & Nichol 2021, algorithm 2). Both are linear in e. What the slot gets is x0 before that.

    Raises ValueError for an eta below 0 or so large that 1 − ᾱ_{t−1} − σ² is negative at some t.
    """
    of_x0, of_eps, std = implicit_terms(diffusion, eta)
    named = _through_eps(diffusion, of_x0, of_eps)
    named["c_z"] = std
    if guided:
        of_score = np.sqrt(1.0 - diffusion.alphas_cumprod)
        named["c_e"] = of_x0 * score_to_xstart(diffusion) - of_eps * of_score
    return _program(named, clip)


def inversion(diffusion: Tables, clip: bool) -> StepProgram:
    """DDIM's step backwards, from x_t to x_{t+1}; from the last timestep on to pure noise, ᾱ = 0."""
    return _program(_through_eps(diffusion, *inversion_terms(diffusion)), clip)


def implicit_terms(diffusion: Tables, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What DDIM's step multiplies x0, ε and the noise with, float64 (T,) each; ValueError as `implicit` raises it."""
    abar, abar_prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    beta_share = (1.0 - abar / abar_prev) / (1.0 - abar)
    # 1 − ᾱ_{t−1} − σ² as a product: the difference can come out below 0 where it should be 0.
    remaining = 1.0 - eta**2 * beta_share
    beyond = np.flatnonzero((abar_prev < 1.0) & (remaining < -_ROUNDING))
    if not eta >= 0 or beyond.size:
        why = f": the noise would pass the whole variance of x_(t-1) at t = {beyond[0]}" if beyond.size else ""
        raise ValueError(f"eta is {eta}; it must be in [0, 1]{why}")
    std = eta * np.sqrt((1.0 - abar_prev) * beta_share)
    std[0] = 0.0
    return np.sqrt(abar_prev), np.sqrt((1.0 - abar_prev) * np.maximum(remaining, 0.0)), std


def inversion_terms(diffusion: Tables) -> tuple[np.ndarray, np.ndarray]:
    """What the step backwards multiplies x0 and ε with, float64 (T,) each."""
    return np.sqrt(diffusion.alphas_cumprod_next), np.sqrt(1.0 - diffusion.alphas_cumprod_next)


def masked_noise(diffusion: Tables) -> StepProgram:
    """The noise alone, none of it at t = 0."""
    rows = len(diffusion.betas)
    return step_program({"c_z": np.append(0.0, np.ones(rows - 1))}, np.arange(rows))


def xstart(diffusion: Tables, clip: bool) -> StepProgram:
    """The x0 that the network predicts, in the place of the sample."""
    rows = len(diffusion.betas)
    named = {**_x0_columns(diffusion), "c_0": np.ones(rows)}
    return step_program(named, np.arange(rows), clip=(-1.0, 1.0) if clip else None)


def _through_eps(diffusion: Tables, of_x0: np.ndarray, of_eps: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of of_x0·x0 + of_eps·ε with ε = (√(1/ᾱ)·x − x0)/√(1/ᾱ−1)."""
    recip, recipm1 = diffusion.sqrt_recip_alphas_cumprod, diffusion.sqrt_recipm1_alphas_cumprod
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isinf(recip), 1.0, recip / recipm1)
    return {**_x0_columns(diffusion), "c_x": of_eps * ratio, "c_0": of_x0 - of_eps / recipm1}


def _x0_columns(diffusion: Tables) -> dict[str, np.ndarray]:
    """Columns a_x and a_m, x0 = a_x·x + a_m·m. Raises ValueError where ᾱ is 0 and the network predicts ε."""
    if diffusion.model_mean_type == ModelMeanType.START_X:
        return {"a_m": np.ones(len(diffusion.betas))}
    if diffusion.model_mean_type == ModelMeanType.PREVIOUS_X:
        coef1, coef2 = diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2
        return {"a_x": -coef2 / coef1, "a_m": 1.0 / coef1}
    recip, recipm1 = diffusion.sqrt_recip_alphas_cumprod, diffusion.sqrt_recipm1_alphas_cumprod
    lost = np.flatnonzero(~(recip <= np.finfo(np.float32).max))
    if lost.size:
        raise ValueError(
            f"betas leave alphas_cumprod[{lost[0]}] = {diffusion.alphas_cumprod[lost[0]]}, from which x0 cannot be "
            "recovered by a network that predicts EPSILON; use START_X, or a schedule that ends above 0"
        )
    return {"a_x": recip, "a_m": -recipm1}


def _program(named: Mapping[str, np.ndarray], clip: bool, variance: str = "fixed") -> StepProgram:
    rows = len(named["a_m"])
    return step_program(
        {**named, "g0_0": np.ones(rows)},
        np.arange(rows),
        writes=np.tile([0, -1], (rows, 1)),
        num_slots=1,
        variance=variance,
        clip=(-1.0, 1.0) if clip else None,
    )
