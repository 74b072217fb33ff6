"""Steps and losses of the guided-diffusion classes against the same ones as a chain of tensor operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare import assert_close
from benchmarks.guided import GuidedDiffusion
from diffkern.integrations.guided_diffusion import create_gaussian_diffusion
from diffkern.process import GaussianProcess, linear_betas

A_CHAIN = "a chain of tensor operations"
NOISE_OF_TORCH = "torch's draws"
SHAPES = [(256, 3, 32, 32), (1, 3, 32, 32)]


class Case:
    """A step in the middle, of a network that learns its variance and returns a stored tensor."""

    def __init__(self, shape, device, noise):
        torch.manual_seed(0)
        self.diffusion = create_gaussian_diffusion(learn_sigma=True, noise=noise)
        self.baseline = GuidedDiffusion(GaussianProcess(linear_betas(1000)))
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
        A_CHAIN,
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


class LossCase(Case):
    """A batch of training: images of 256 grey levels, timesteps of all sizes, 0 among them."""

    def __init__(self, shape, device):
        super().__init__(shape, device, "torch")
        self.x0 = (torch.randint(256, shape) / 127.5 - 1).to(device)
        self.noise = torch.randn(shape).to(device)
        self.t = torch.randint(1, 1000, shape[:1]).to(device)
        self.t[0] = 0
        self.x = self.diffusion.q_sample(self.x0, self.t, self.noise)
        # Near the target: t = 0 then compares probabilities, and not the floor under them.
        self.output = self.output * 0.1
        self.output[:, : shape[1]] += self.noise


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_losses(compare, device, shape):
    case = LossCase(shape, device)
    output = case.output.requires_grad_()

    def ours():
        loss = case.diffusion.training_losses(case.model, case.x0, case.t, noise=case.noise)["loss"]
        return loss, torch.autograd.grad(loss.mean(), output)[0]

    def theirs():
        x_t = case.baseline.noised(case.x0, case.t, case.noise)
        loss = case.baseline.hybrid(output, case.x0, x_t, case.t, case.noise)
        return loss, torch.autograd.grad(loss.mean(), output)[0]

    expected = tuple(value.detach() for value in theirs())
    compare_losses(
        compare, f"training_losses, hybrid, forward + backward, {case.name}", ours, theirs, expected, 9 * case.nbytes
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound_term(compare, device, shape):
    case = LossCase(shape, device)

    @torch.no_grad()
    def ours():
        found = case.diffusion._vb_terms_bpd(case.model, x_start=case.x0, x_t=case.x, t=case.t)
        return found["output"], found["pred_xstart"]

    @torch.no_grad()
    def theirs():
        return case.baseline.bound_term(case.output, case.x0, case.x, case.t, clip=True)

    compare_losses(compare, f"_vb_terms_bpd, {case.name}", ours, theirs, theirs(), 5 * case.nbytes)


def compare_losses(compare, name, ours, theirs, expected, bytes_moved):
    """The chain's float32 is off by about 1e-4 where two cumulative probabilities are nearly equal."""

    def check(result):
        for value, wanted in zip(result, expected, strict=True):
            assert_close(wanted.double(), 2e-4)(value.detach())

    compare(
        "guided_diffusion",
        name,
        A_CHAIN,
        ours,
        theirs,
        bytes_moved=bytes_moved,
        check=check,
        within="vb_terms",
        headline="256" in name,
    )
