"""A solver's step against the usual composition of tensor operations, its compiled form, and diffusers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import eager
from benchmarks.baselines import compiled, ddpm_scheduler
from benchmarks.compare import assert_close
from diffkern.backends import use_backend
from diffkern.ops import solver_step
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import build

SHAPES = [(256, 3, 32, 32), (16, 3, 256, 256)]


class Case:
    """A row in the middle of the program, with noise of its own."""

    def __init__(self, solver, shape, device):
        torch.manual_seed(0)
        process = GaussianProcess(linear_betas(1000))
        self.program = build(solver, process if solver == "ddpm" else process.respace(50))
        self.step = eager.DDPMStep(process) if solver == "ddpm" else eager.DDIMStep(process, 50)
        self.row = self.program.num_rows // 2
        self.x, self.output = (torch.randn(shape).to(device) for _ in range(2))
        self.out = torch.empty_like(self.x)
        self.check = self.check_of(seed=1)
        self.name = f"{solver}, {'×'.join(map(str, shape))}"
        self.bytes_moved = 3 * self.x.nbytes

    def check_of(self, **source):
        """A check against the reference in float64, which takes its noise from `source`."""
        with use_backend("reference"):
            return assert_close(solver_step(self.x.double(), self.output.double(), self.program, self.row, **source))

    def ours(self, **source):
        return solver_step(self.x, self.output, self.program, self.row, out=self.out, **(source or {"seed": 1}))


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solver_step(compare, device, shape, solver):
    case = Case(solver, shape, device)
    compare(
        "solver_step",
        case.name,
        "randn_like + eager" if solver == "ddpm" else "eager",
        case.ours,
        lambda: case.step(case.x, case.output, case.row),
        bytes_moved=case.bytes_moved,
        check=case.check,
        check_baseline=case.check if solver == "ddim" else None,
        headline=shape == SHAPES[0],
    )


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_solver_step_compiled(compare, device, solver):
    case = Case(solver, SHAPES[0], device)
    fused = compiled(case.step)
    compare(
        "solver_step",
        case.name,
        "torch.compile",
        case.ours,
        lambda: fused(case.x, case.output, case.row),
        bytes_moved=case.bytes_moved,
        check=case.check,
        check_baseline=case.check if solver == "ddim" else None,
    )


def test_solver_step_thresholded(compare, device):
    """Dynamic thresholding: a quantile of each sample's |x0| before the step."""
    case = Case("ddim", SHAPES[0], device)
    threshold = (0.995, 1.5)
    case.program = dataclasses.replace(case.program, clip=None, threshold=threshold)
    step = eager.DDIMStep(GaussianProcess(linear_betas(1000)), 50, threshold)
    check = case.check_of()
    compare(
        "solver_step",
        f"{case.name}, dynamic threshold",
        "eager",
        lambda: solver_step(case.x, case.output, case.program, case.row, out=case.out),
        lambda: step(case.x, case.output, case.row),
        bytes_moved=case.bytes_moved,
        check=check,
        check_baseline=check,
    )


def test_solver_step_guided(compare, device):
    """Classifier-free guidance with its rescaling: two deviations of each sample before the step."""
    case = Case("ddim", SHAPES[0], device)
    both = torch.cat([case.output, torch.randn_like(case.output)])
    guidance = {"guidance_scale": 5.0, "guidance_rescale": 0.7}
    with use_backend("reference"):
        check = assert_close(solver_step(case.x.double(), both.double(), case.program, case.row, **guidance))
    compare(
        "solver_step",
        f"{case.name}, guidance and its rescale",
        "eager",
        lambda: solver_step(case.x, both, case.program, case.row, out=case.out, **guidance),
        lambda: case.step(case.x, eager.rescaled_guidance(both, 5.0, 0.7), case.row),
        bytes_moved=case.bytes_moved + case.x.nbytes,
        check=check,
        check_baseline=check,
    )


@pytest.mark.parametrize("noise", ["own noise", "torch's draws"])
def test_solver_step_against_diffusers(compare, device, noise):
    """DDPMScheduler.step draws with torch, as we do with a generator: from the same seed the results are equal."""
    case = Case("ddpm", SHAPES[0], device)
    # Two generators, so that neither side's draws depend on the other's.
    mine, theirs = (torch.Generator(device).manual_seed(3) for _ in range(2))
    drawn = torch.empty_like(case.x).normal_(generator=torch.Generator(device).manual_seed(3))
    check = case.check_of(noise=drawn.double())
    scheduler = None

    def step():
        nonlocal scheduler
        scheduler = scheduler or ddpm_scheduler()
        t = scheduler.timesteps[case.row]
        return scheduler.step(case.output, t, case.x, generator=theirs).prev_sample

    own = noise == "own noise"
    compare(
        "solver_step",
        f"{case.name}, {noise}",
        "diffusers DDPMScheduler.step",
        case.ours if own else lambda: case.ours(generator=mine),
        step,
        bytes_moved=case.bytes_moved,
        check=case.check if own else check,
        check_baseline=check,
        headline=True,
    )
