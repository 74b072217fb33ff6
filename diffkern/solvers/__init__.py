"""Solvers: pure functions, in float64, from a diffusion process to a StepProgram that `solver_step` executes."""

from diffkern.solvers.ddim import ddim as ddim
from diffkern.solvers.ddpm import ddpm as ddpm
from diffkern.solvers.dpm_multistep import dpm_multistep as dpm_multistep
from diffkern.solvers.dpmpp_2m import dpmpp_2m as dpmpp_2m
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
