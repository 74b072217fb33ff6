"""Steps of the guided-diffusion classes against the same steps as a chain of tensor operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare import assert_close
from benchmarks.guided import GuidedSteps
from diffkern.integrations.guided_diffusion import create_gaussian_diffusion
from diffkern.process import GaussianProcess, linear_betas

NOISE_OF_TORCH = "torch's draws"
SHAPES = [(256, 3, 32, 32), (1, 3, 32, 32)]


class Case:
    """A step in the middle, of a network that learns its variance and returns a stored tensor."""

    def __init__(self, shape, device, noise):
        torch.manual_seed(0)
        self.diffusion = create_gaussian_diffusion(learn_sigma=True, noise=noise)
        self.baseline = GuidedSteps(GaussianProcess(linear_betas(1000)))
        self.x = torch.randn(shape).to(device)
        self.output = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(device)
        self.t = torch.full(shape[:1], 500, device=device)
        self.name = f"{'×'.join(map(str, shape))}"
        self.nbytes = self.x.nbytes

    def model(self, x, t):
        return self.output

    def ours(self, step, **options):
        return tuple(getattr(self.diffusion, step)(self.model, self.x, self.t, **options).values())

    def theirs(self, step, **options):
        return tuple(getattr(self.baseline, step)(self.output, self.x, self.t, **options).values())


def compare_step(compare, case, name, noise, ours, theirs, *, tensors, headline):
    """Both sides draw the same noise from the same seed, but for own noise: then x0 alone is the same."""

    def seeded(call):
        torch.manual_seed(1)
        return call()

    close_sample, close_x0 = (assert_close(value, 4e-6) for value in seeded(theirs))
    if noise == "torch":
        close_sample(seeded(ours)[0])
    compare(
        "guided_diffusion",
        f"{name}, {case.name}, {'own noise' if noise == 'philox' else NOISE_OF_TORCH}",
        "a chain of tensor operations",
        ours,
        theirs,
        bytes_moved=tensors * case.nbytes,
        check=lambda result: close_x0(result[1]),
        check_baseline=lambda result: close_x0(result[1]),
        within="solver_step",
        headline=headline,
    )


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p_sample(compare, device, shape, noise):
    case = Case(shape, device, noise)
    compare_step(
        compare,
        case,
        "p_sample, learned Σ",
        noise,
        lambda: case.ours("p_sample"),
        lambda: case.theirs("ancestral"),
        tensors=5,
        headline=shape == SHAPES[0],
    )


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ddim_sample(compare, device, shape, noise):
    case = Case(shape, device, noise)
    compare_step(
        compare,
        case,
        "ddim_sample, learned Σ",
        noise,
        lambda: case.ours("ddim_sample"),
        lambda: case.theirs("ddim", eta=0.0),
        tensors=4,
        headline=shape == SHAPES[0],
    )
