"""Solvers: pure functions, in float64, from a diffusion process to a StepProgram that `solver_step` executes."""

from diffkern.solvers.ddim import channels_of as channels_of
from diffkern.solvers.ddim import ddim as ddim
from diffkern.solvers.ddim import ddim_inverse as ddim_inverse
from diffkern.solvers.ddpm import ddpm as ddpm
from diffkern.solvers.deis import deis as deis
from diffkern.solvers.dpm_singlestep import dpm_singlestep as dpm_singlestep
from diffkern.solvers.dpmpp_2m import dpmpp_2m as dpmpp_2m
from diffkern.solvers.grid import grid as grid
from diffkern.solvers.lms import lms as lms
from diffkern.solvers.program import StepProgram as StepProgram
from diffkern.solvers.program import columns as columns
from diffkern.solvers.program import step_program as step_program
from diffkern.solvers.registry import SOLVERS as SOLVERS
from diffkern.solvers.registry import build as build
from diffkern.solvers.transitions import Transitions as Transitions
from diffkern.solvers.transitions import chain as chain
from diffkern.solvers.transitions import single_steps as single_steps
from diffkern.solvers.transitions import transitions as transitions
