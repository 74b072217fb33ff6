"""Solvers by name."""

from __future__ import annotations

from collections.abc import Iterable

from diffkern.process import GaussianProcess
from diffkern.solvers.ddim import ddim
from diffkern.solvers.ddpm import ddpm
from diffkern.solvers.dpmpp_2m import dpmpp_2m
from diffkern.solvers.program import StepProgram

SOLVERS = ("ddpm", "ddim", "dpmpp_2m")


def build(
    name: str,
    process: GaussianProcess,
    steps: int | str | Iterable[int] | None = None,
    *,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    eta: float = 0.0,
) -> StepProgram:
    """The program of the solver called `name`, one of SOLVERS, in `steps` of the process's steps (None: all).

    `steps` is an int S (evenly spaced), or sections or "ddimN" as `process.space_timesteps` reads them. x0 is clipped
    to `clip`. `eta` belongs to "ddim".

    Raises ValueError for an unknown name, an eta that the solver does not take, and steps that cannot be had.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; it may be one of {', '.join(map(repr, SOLVERS))}")
    process = process.respace(steps)
    if name == "ddim":
        return ddim(process, clip=clip, eta=eta)
    if eta != 0:
        raise ValueError(f"eta is {eta}; the solver {name!r} takes none")
    if name == "dpmpp_2m":
        return dpmpp_2m(process, clip=clip)
    return ddpm(process, clip=clip)
