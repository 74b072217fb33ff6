"""Solvers: pure functions, in float64, from a diffusion process to a StepProgram that `solver_step` executes."""

from diffkern.solvers.churn import Churn as Churn
from diffkern.solvers.ddim import ddim as ddim
from diffkern.solvers.ddpm import ddpm as ddpm
from diffkern.solvers.dpm_multistep import dpm_multistep as dpm_multistep
from diffkern.solvers.dpmpp_2m import dpmpp_2m as dpmpp_2m
from diffkern.solvers.euler import euler as euler
from diffkern.solvers.euler import euler_ancestral as euler_ancestral
from diffkern.solvers.heun import heun as heun
from diffkern.solvers.pndm import halfway as halfway
from diffkern.solvers.pndm import plms as plms
from diffkern.solvers.pndm import pndm as pndm
from diffkern.solvers.program import StepProgram as StepProgram
from diffkern.solvers.program import columns as columns
from diffkern.solvers.program import step_program as step_program
from diffkern.solvers.registry import SOLVERS as SOLVERS
from diffkern.solvers.registry import build as build
from diffkern.solvers.transitions import Transitions as Transitions
from diffkern.solvers.transitions import chain as chain
from diffkern.solvers.transitions import single_steps as single_steps
from diffkern.solvers.transitions import transitions as transitions
from diffkern.solvers.unipc import unipc as unipc
