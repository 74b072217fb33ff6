"""OpenAI's guided-diffusion and improved-diffusion, with the modules and names that their users import.

Sampling, losses, likelihood and schedule samplers.
"""

from diffkern.integrations.guided_diffusion.gaussian_diffusion import GaussianDiffusion as GaussianDiffusion
from diffkern.integrations.guided_diffusion.gaussian_diffusion import betas_for_alpha_bar as betas_for_alpha_bar
from diffkern.integrations.guided_diffusion.gaussian_diffusion import get_named_beta_schedule as get_named_beta_schedule
from diffkern.integrations.guided_diffusion.resample import (
    create_named_schedule_sampler as create_named_schedule_sampler,
)
from diffkern.integrations.guided_diffusion.respace import SpacedDiffusion as SpacedDiffusion
from diffkern.integrations.guided_diffusion.respace import space_timesteps as space_timesteps
from diffkern.integrations.guided_diffusion.script_util import create_gaussian_diffusion as create_gaussian_diffusion
from diffkern.integrations.guided_diffusion.types import LossType as LossType
from diffkern.integrations.guided_diffusion.types import ModelMeanType as ModelMeanType
from diffkern.integrations.guided_diffusion.types import ModelVarType as ModelVarType
