"""create_gaussian_diffusion: a diffusion from the flags of OpenAI's scripts."""

from __future__ import annotations

from collections.abc import Iterable

from diffkern.integrations.guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from diffkern.integrations.guided_diffusion.respace import SpacedDiffusion, space_timesteps
from diffkern.integrations.guided_diffusion.types import LossType, ModelMeanType, ModelVarType


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Iterable[int] = "",
    noise: str = "torch",
) -> SpacedDiffusion:
    """The diffusion of `steps` steps of `noise_schedule`, or of those that `timestep_respacing` keeps of them.

    The network predicts x0 with `predict_xstart`, else ε. Its variance is learned in the range from β̃ to β with
    `learn_sigma`, else fixed: β̃ with `sigma_small`, else β. The loss is the variational bound with `use_kl`, else the
    squared error, with `rescale_learned_sigmas` beside a bound scaled down. `noise` is GaussianDiffusion's.
    """
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        noise=noise,
    )
