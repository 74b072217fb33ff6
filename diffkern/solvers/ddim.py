"""DDIM and its inversion as StepPrograms: Song et al. 2021, arXiv 2010.02502."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess
from diffkern.solvers.program import StepProgram, step_program
from diffkern.solvers.transitions import Process, Transitions, transitions

Clip = tuple[float, float] | None


def ddim(
    process: Process | Transitions,
    *,
    clip: Clip = (-1.0, 1.0),
    threshold: Clip = None,
    eta: float = 0.0,
    rederive_eps: bool = True,
    classifier: bool = False,
) -> StepProgram:
    """One row for each step of `process`, from t = T−1 to 0; the row for t is eq. 12,

        x_{t−1} = √ᾱ_{t−1}·x0 + √(1 − ᾱ_{t−1} − σ²)·ε + σ·z,   σ = η·√β̃_t,   ε = (x_t − √ᾱ_t·x0)/√(1−ᾱ_t)

    where x0 is clipped first and ε follows from the clipped one, as in OpenAI's code; with `rederive_eps=False` ε is
    what the network said, whatever became of x0. η = 0 is deterministic, η = 1 ancestral. Of a network that learns its
    variance only the first C channels are used. Sample in fewer steps from a respaced process.

    With `classifier` the rows read e, the gradient of a classifier's log p(y | x_t), as Dhariwal & Nichol 2021, arXiv
    2105.05233, algorithm 2: ε loses √(1−ᾱ_t)·e, and x0, after it was clipped, gains (1−ᾱ_t)/√ᾱ_t·e.

    Of Transitions each is a row; η above 0 is for steps with σ² = 1 − α².

    Raises ValueError for an η outside [0, 1] and one above 0 in other steps, where x0 cannot be had from the prediction
    (eps at ᾱ = 0), and for a classifier at ᾱ = 0, where its gradient says nothing of x0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")
    steps = transitions(process)
    if eta and not np.allclose(steps.alpha**2 + steps.sigma**2, 1.0):
        raise ValueError(f"eta is {eta}; it must be 0 for steps whose alpha² + sigma² is not 1")
    named = steps.x0_columns()
    sigma, clipped = steps.sigma, clip is not None or threshold is not None
    of_eps, std = steps.sigma_next, np.zeros(steps.num_rows)
    if eta:
        beta = 1.0 - (steps.alpha / steps.alpha_next) ** 2
        std = eta * steps.sigma_next / sigma * np.sqrt(beta)
        # 1 − ᾱ_{t−1} − σ² as a product: the difference can come out below 0 where it should be 0.
        of_eps = steps.sigma_next * np.sqrt(np.maximum(1.0 - eta**2 * beta / sigma**2, 0.0))
    if rederive_eps and clipped:
        named["c_x"] = of_eps / sigma
        named["c_0"] = steps.alpha_next - named["c_x"] * steps.alpha
    else:
        named["c_x"], named["c_m"], named["c_0"] = of_eps * steps.e_x, of_eps * steps.e_m, steps.alpha_next
    named["c_z"] = std
    if classifier:
        if (steps.alpha == 0).any():
            raise ValueError("classifier is True, but alphas_cumprod ends at 0, where a gradient says nothing of x0")
        named["c_e"] = steps.alpha_next * sigma**2 / steps.alpha - of_eps * sigma
    return step_program(named, steps.times, variance=channels_of(process), clip=clip, threshold=threshold)


def ddim_inverse(
    process: Process | Transitions, *, clip: Clip = None, threshold: Clip = None, variance: str | None = None
) -> StepProgram:
    """The other way: from an image to the x_{T−1} that DDIM with η = 0 leads back to it. Row t, from 0 to T−1, is

        x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε,   x0 = (x_{t−1} − √(1−ᾱ_{t−1})·ε)/√ᾱ_{t−1}

    with x_{−1} the image and ε the network's, given x_{t−1} and t: DDIM's row solved for x_t, but for the x that ε is
    taken at, x_t there (Song et al. 2021, section 4.3; Mokady et al. 2022, arXiv 2211.09794, section 3). It is of first
    order: more steps return nearer to the image. Transitions are those of the way back, and are gone up from the last.
    `variance` is the program's; without it, what a network of `process` has.

    Raises ValueError where x0 cannot be had from the prediction (eps at ᾱ = 0).
    """
    steps = transitions(process)
    named = {
        "a_x": (1.0 - steps.sigma_next * steps.e_x) / steps.alpha_next,
        "a_m": -steps.sigma_next * steps.e_m / steps.alpha_next,
        "c_x": steps.sigma * steps.e_x,
        "c_m": steps.sigma * steps.e_m,
        "c_0": steps.alpha,
    }
    named = {name: column[::-1] for name, column in named.items()}
    channels = channels_of(process) if variance is None else variance
    return step_program(named, steps.times[::-1], variance=channels, clip=clip, threshold=threshold)


def channels_of(process: Process | Transitions) -> str:
    """The `variance` of a program that reads the mean's channels alone.

    Bounds of 0 on the log-variance leave σ = 1, whatever the network's variance channels say.
    """
    learned = isinstance(process, GaussianProcess) and process.channel_variance != "fixed"
    return "learned_range" if learned else "fixed"
