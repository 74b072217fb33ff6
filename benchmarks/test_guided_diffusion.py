"""Steps of the guided-diffusion classes against the same steps as a chain of tensor operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare import assert_close
from benchmarks.guided import GuidedSteps
from diffkern.integrations.guided_diffusion import create_gaussian_diffusion
from diffkern.process import GaussianProcess, linear_betas

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

    def checks(self, theirs, own_noise):
        """Checks of both sides, which draw from the same seed; of x0 alone where they draw other noise."""
        torch.manual_seed(1)
        expected = theirs()
        close = [assert_close(value, 4e-6) for value in expected]

        def check(result):
            for is_close, value in zip(close[own_noise:], result[own_noise:], strict=True):
                is_close(value)

        return check


def compare_step(compare, case, name, noise, ours, theirs, *, tensors, headline):
    own = noise == "philox"
    check = case.checks(theirs, own)

    def seeded(call):
        torch.manual_seed(1)
        return call()

    check(seeded(ours))
    compare(
        "guided_diffusion",
        f"{name}, {case.name}, {'own noise' if own else 'torch' + chr(39) + 's draws'}",
        "a chain of tensor operations",
        ours,
        theirs,
        bytes_moved=tensors * case.nbytes,
        check=lambda result: None,
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
