"""The mathematics of the diffusion process, in float64 NumPy: schedules, respacing, marginal and posterior, weights."""

from diffkern.process.flow import FlowProcess as FlowProcess
from diffkern.process.gaussian import GaussianProcess as GaussianProcess
from diffkern.process.gaussian import ProcessTables as ProcessTables
from diffkern.process.schedules import SCHEDULES as SCHEDULES
from diffkern.process.schedules import betas_for_alpha_bar as betas_for_alpha_bar
from diffkern.process.schedules import cosine_betas as cosine_betas
from diffkern.process.schedules import exp_betas as exp_betas
from diffkern.process.schedules import laplace_betas as laplace_betas
from diffkern.process.schedules import linear_betas as linear_betas
from diffkern.process.schedules import make_betas as make_betas
from diffkern.process.schedules import scaled_linear_betas as scaled_linear_betas
from diffkern.process.schedules import sigmoid_beta_betas as sigmoid_beta_betas
from diffkern.process.schedules import sigmoid_betas as sigmoid_betas
from diffkern.process.schedules import zero_terminal_snr as zero_terminal_snr
from diffkern.process.sigmas import SIGMA_SPACINGS as SIGMA_SPACINGS
from diffkern.process.sigmas import space_sigmas as space_sigmas
from diffkern.process.sigmas import timesteps_of_sigmas as timesteps_of_sigmas
from diffkern.process.spacing import SPACINGS as SPACINGS
from diffkern.process.spacing import space_timesteps as space_timesteps
from diffkern.process.weightings import WEIGHTINGS as WEIGHTINGS
from diffkern.process.weightings import loss_weights as loss_weights
