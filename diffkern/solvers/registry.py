"""Solvers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffkern.process import GaussianProcess
from diffkern.process.spacing import Steps
from diffkern.solvers.churn import Churn
from diffkern.solvers.ddim import Clip, channels_of, ddim
from diffkern.solvers.ddpm import ddpm
from diffkern.solvers.deis import deis
from diffkern.solvers.dpm_multistep import dpm_multistep
from diffkern.solvers.dpm_singlestep import dpm_singlestep
from diffkern.solvers.dpmpp_2m import dpmpp_2m
from diffkern.solvers.euler import euler, euler_ancestral
from diffkern.solvers.grid import grid
from diffkern.solvers.heun import heun
from diffkern.solvers.lms import lms
from diffkern.solvers.pndm import halfway, plms, pndm
from diffkern.solvers.program import StepProgram
from diffkern.solvers.transitions import Process, Transitions
from diffkern.solvers.unipc import unipc


@dataclass(frozen=True)
class Solver:
    """One of SOLVERS: `function(levels, clip=…, threshold=…, **fixed, **options)` gives its program.

    `options` names the keywords that a user may give. `classifier`: whether it takes classifier=True.
    `own_steps`: whether it needs the steps of a GaussianProcess and takes no Transitions. `full`: whether it takes
    the process that its steps were chosen from, full=….
    """

    function: Callable[..., StepProgram]
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    classifier: bool = False
    own_steps: bool = False
    full: bool = False


def _churned(function: Callable[..., StepProgram]) -> Callable[..., StepProgram]:
    def build(levels: GaussianProcess | Transitions, **given: Any) -> StepProgram:
        churn = Churn(**{name: given.pop(name) for name in CHURN if name in given})
        return function(levels, churn=churn, **given)

    return build


def _ordered(function: Callable[..., StepProgram]) -> Callable[..., StepProgram]:
    """`order` for all rows instead of `orders`."""
    return lambda levels, order=2, **given: function(levels, orders=order, **given)


def _pndm(levels: GaussianProcess, *, full: GaussianProcess, clip: Clip, threshold: Clip) -> StepProgram:
    return pndm(levels, halfway(levels, full), clip=clip, threshold=threshold)


CHURN = ("s_churn", "s_min", "s_max", "s_noise")
SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, classifier=True, own_steps=True),
    "ddim": Solver(ddim, ("eta",), classifier=True),
    "plms": Solver(plms),
    "pndm": Solver(_pndm, own_steps=True, full=True),
    "euler": Solver(_churned(euler), CHURN, full=True),
    "euler_ancestral": Solver(euler_ancestral, ("eta", "s_noise")),
    "heun": Solver(_churned(heun), CHURN, full=True),
    "lms": Solver(lms, ("order",)),
    "deis": Solver(deis, ("order",)),
    "dpm_solver_2": Solver(dpm_singlestep, fixed={"order": 2, "predicts": "eps"}),
    "dpm_solver_3": Solver(dpm_singlestep, fixed={"order": 3, "predicts": "eps"}),
    "dpm_solver_2m": Solver(dpm_multistep, fixed={"algorithm": "dpmsolver", "orders": 2}),
    "dpm_solver_3m": Solver(dpm_multistep, fixed={"algorithm": "dpmsolver", "orders": 3}),
    "dpmpp_1s": Solver(dpm_singlestep, fixed={"order": 1}),
    "dpmpp_2s": Solver(dpm_singlestep, fixed={"order": 2}),
    "dpmpp_3s": Solver(dpm_singlestep, fixed={"order": 3}),
    "dpmpp_2m": Solver(dpmpp_2m),
    "dpmpp_3m": Solver(dpm_multistep, fixed={"orders": 3}),
    "dpmpp_2m_sde": Solver(dpm_multistep, ("solver_type",), {"algorithm": "sde-dpmsolver++", "orders": 2}),
    "dpmpp_3m_sde": Solver(dpm_multistep, fixed={"algorithm": "sde-dpmsolver++", "orders": 3}),
    "unipc": Solver(_ordered(unipc), ("order", "variant")),
}


def build(
    name: str,
    process: Process,
    steps: Steps | None = None,
    *,
    spacing: str = "respaced",
    steps_offset: int = 0,
    sigmas: str | None = None,
    start: int | None = None,
    clip: Clip = (-1.0, 1.0),
    threshold: Clip = None,
    classifier: bool = False,
    eta: float | None = None,
    **options: Any,
) -> StepProgram:
    """The program of the solver called `name`, one of SOLVERS, in `steps` of the process's steps (None: all).

    `steps` is an int S, or sections or "ddimN"; `spacing`, `steps_offset`, `sigmas` and `start` say which levels of
    noise are visited (:func:`diffkern.solvers.grid.grid`). x0 is clipped to `clip`, or, with `threshold` = (ratio,
    max), thresholded instead: clipped to ±S and divided by it, S being that quantile of |x0| within [1, max] (Saharia
    et al. 2022, arXiv 2205.11487, section 2.3). With `classifier` the program reads a classifier's gradient.
    `eta` (None: the solver's default) and `options` are the solver's own; an eta of 0 is one that every solver takes.

    Raises ValueError for an unknown name, an option that the solver does not take, and steps that cannot be had.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; it may be one of {', '.join(map(repr, SOLVERS))}")
    solver = SOLVERS[name]
    if eta is not None and (eta != 0 or "eta" in solver.options):
        options["eta"] = eta
    for option, value in options.items():
        if option not in solver.options:
            takes = f"takes {', '.join(solver.options)}" if solver.options else "takes none"
            raise ValueError(f"{option} is {value}; the solver {name!r} {takes}")
    if classifier:
        if not solver.classifier:
            able = ", ".join(repr(other) for other, entry in SOLVERS.items() if entry.classifier)
            raise ValueError(f"the solver {name!r} takes no classifier's gradient; those that do are {able}")
        options["classifier"] = True
    if solver.own_steps and not (isinstance(process, GaussianProcess) and sigmas is None):
        raise ValueError(f"the solver {name!r} needs the steps of a GaussianProcess, and sigmas=None")
    levels = grid(process, steps, spacing=spacing, steps_offset=steps_offset, sigmas=sigmas, start=start)
    if solver.full and isinstance(levels, GaussianProcess):
        options["full"] = process
    limits: dict[str, Clip] = {"clip": clip if threshold is None else None, "threshold": threshold}
    program = solver.function(levels, **limits, **solver.fixed, **options)
    # Transitions do not say that the network has variance channels as well.
    return replace(program, variance=channels_of(process)) if isinstance(levels, Transitions) else program
