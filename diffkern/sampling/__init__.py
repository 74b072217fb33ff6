"""Sampling: a model, a process and a solver's program, run from noise to images."""

from diffkern.sampling.sampler import Sampler as Sampler
