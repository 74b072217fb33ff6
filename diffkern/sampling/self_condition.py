"""The x0 of the row before, for networks that take it as an input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffkern.solvers import StepProgram, step_program

# What networks are given in training: x0 held in the images' range, whatever the sampler's own x0 is clipped to.
RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class SelfConditioned:
    """A program, and where its rows leave the x0 that the network is given next (Chen et al. 2022, arXiv 2208.04202):
    in the last slot of `program`, or, where `x0_program` is not None, in what a step of that returns."""

    program: StepProgram
    x0_program: StepProgram | None


def self_conditioned(program: StepProgram) -> SelfConditioned:
    """`program`, made to remember x0 in [−1, 1].

    The step itself writes it to one slot more, without a further pass, if the program holds its own x0 in that range,
    has room to write it in every row, and calls the network in every row: a row that does not has no x0 of its own.
    """
    within = program.clip == RANGE or program.threshold is not None  # thresholding divides by what it clips to
    if not within:
        columns = {"a_x": program.column("a_x"), "a_m": program.column("a_m"), "c_0": np.ones(program.num_rows)}
        x0 = step_program(columns, program.times, variance=program.variance, clip=RANGE)
        return SelfConditioned(program, x0)
    if (program.writes >= 0).all(axis=1).any() or not program.calls_network.all():
        return SelfConditioned(program, program.x0_program())
    return SelfConditioned(program.with_x0(), None)
