"""The mathematics of the diffusion process, in float64 NumPy: schedules, respacing, marginal and posterior."""

from diffkern.process.gaussian import GaussianProcess as GaussianProcess
from diffkern.process.gaussian import ProcessTables as ProcessTables
from diffkern.process.schedules import betas_for_alpha_bar as betas_for_alpha_bar
from diffkern.process.schedules import cosine_betas as cosine_betas
from diffkern.process.schedules import linear_betas as linear_betas
from diffkern.process.schedules import make_betas as make_betas
from diffkern.process.schedules import scaled_linear_betas as scaled_linear_betas
from diffkern.process.sigmas import SIGMA_SPACINGS as SIGMA_SPACINGS
from diffkern.process.sigmas import space_sigmas as space_sigmas
from diffkern.process.sigmas import timesteps_of_sigmas as timesteps_of_sigmas
from diffkern.process.spacing import space_timesteps as space_timesteps
