"""Sampling with a network that is given the x0 of its call before: against loops written out here."""

import numpy as np
import pytest
import torch

from diffkern.models import UNet, UNetConfig
from diffkern.ops import philox_normal
from diffkern.process import FlowProcess, GaussianProcess, linear_betas
from diffkern.sampling import Sampler
from diffkern.sampling.self_condition import self_conditioned
from diffkern.solvers import SOLVERS, build
from tests.golden_data import error
from tests.sampling import reference
from tests.sampling.networks import CLASSES, ConditionalSelfConditioning, SelfConditioning, label_shift
from tests.solvers.executor import execute, new_slots

SHAPE = (3, 4, 6)
LABELS = [0, 3, 1, 2, 3]


def make_process(prediction="eps", variance="fixed_small"):
    return GaussianProcess(linear_betas(100), prediction, variance)


def run_table(output, program, x, seed):
    """(x, x0, what the network was given) after each row that calls it: the table in float64 NumPy."""
    state, known, states = x.numpy(), np.zeros(x.shape), []
    slots = new_slots(program, state)
    for row, time in enumerate(program.times):
        noise = None
        if program.makes_noise:
            noise = philox_normal(tuple(x.shape), seed, draw=row, stream=2).double().numpy()
        calls = program.calls_network[row]
        out = np.zeros_like(state)
        if calls:
            out = output(torch.from_numpy(state), torch.tensor([float(time)]), torch.from_numpy(known)).numpy()
        step = execute(program, row, state, out, noise, slots)
        state = step.x
        if calls:
            states.append((step.x, step.x0, known))
            known = step.x0.clip(-1, 1)
    return states


@pytest.mark.parametrize("limits", [{}, {"clip": None}, {"clip": (-2, 2)}], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_hands_on_its_x0(solver, limits):
    """Solvers that make x0 in their step, in a further one, and in rows that call no network (churn)."""
    options = {"s_churn": 3.0} if solver in ("euler", "heun") else {}
    model = SelfConditioning()
    sampler = Sampler(model, make_process("v"), SHAPE, solver=solver, steps=8, **limits, **options)
    with torch.no_grad():
        expected = run_table(model.evaluate_known, sampler.program, reference.x_T(2, SHAPE, 1), 1)
    states = list(sampler.sample_progressive(2, seed=1))
    tolerance = 5 * reference.tolerance(sampler.program)
    for (_, x, x0), known, (x_ref, x0_ref, known_ref) in zip(states, model.known, expected, strict=True):
        assert np.abs(known.numpy() - known_ref).max() < tolerance * max(1, np.abs(x0_ref).max())
        assert error(x.numpy(), x_ref) < tolerance
        assert error(x0.numpy(), x0_ref) < tolerance
    assert not model.known[0].any()
    torch.testing.assert_close(sampler.sample(2, seed=1), states[-1][1], rtol=0, atol=0)
    torch.testing.assert_close(sampler.sample(2, seed=1, batch_size=1), states[-1][1], rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [None, (0.9, 2.0)])
@pytest.mark.parametrize("learned", [False, True])
def test_ddim_written_out_with_guidance(learned, threshold):
    """Both halves of the doubled batch are given the x0 of the guided output, as it was clipped or thresholded."""
    variance = "learned_range" if learned else "fixed_small"
    process, scale, seed = make_process("v", variance), 2.5, 3
    model = ConditionalSelfConditioning(learned)
    sampler = Sampler(model, process, SHAPE, steps=10, guidance_scale=scale, threshold=threshold)
    images = sampler.sample(5, seed=seed, labels=LABELS)
    kept, y = process.respace(10), torch.tensor(LABELS)
    x, known = reference.x_T(5, SHAPE, seed), torch.zeros(5, *SHAPE).double()
    with torch.no_grad():
        for t in reversed(range(10)):
            time = torch.tensor([kept.timestep_map[t]])
            u, c = (
                (model.evaluate_known(x, time, known) + label_shift(label))[:, :3]
                for label in (torch.full_like(y, CLASSES), y)
            )
            s, sigma = kept.sqrt_alphas_cumprod[t], kept.sqrt_one_minus_alphas_cumprod[t]
            known = s * x - sigma * (u + scale * (c - u))
            if threshold is not None:
                size = torch.quantile(known.flatten(1).abs(), threshold[0], dim=1).clamp(1, threshold[1])
                known = known / size.reshape(-1, 1, 1, 1)
            known = known.clamp(-1, 1)
            eps = (x - s * known) / sigma
            before = kept.alphas_cumprod_prev[t]
            x = before**0.5 * known + (1 - before) ** 0.5 * eps
    assert error(images.numpy(), x.numpy()) < 1e-5
    assert all(torch.equal(known[:5], known[5:]) for known in model.known)


def test_classifier_guidance_and_a_start():
    """e moves the state and not the x0 that is handed on; a start from an image begins with zeros as well."""
    process, model = make_process("v"), SelfConditioning()
    sampler = Sampler(model, process, SHAPE, solver="ddpm", steps=None, cond_fn=lambda x, t: torch.sin(x))
    x_t = sampler.noise_to(torch.zeros(2, *SHAPE), 5)
    images = sampler.sample(2, seed=4, start=(x_t, 5))
    x, known = x_t.double(), torch.zeros(2, *SHAPE).double()
    with torch.no_grad():
        for row, t in enumerate(reversed(range(6))):
            output = model.evaluate_known(x, torch.tensor([t]), known)
            s, sigma = process.sqrt_alphas_cumprod[t], process.sqrt_one_minus_alphas_cumprod[t]
            known = (s * x - sigma * output).clamp(-1, 1)
            mean = process.posterior_mean_coef1[t] * known + process.posterior_mean_coef2[t] * x
            noise = philox_normal(x.shape, 4, draw=row, stream=2).double()
            x = mean + process.posterior_variance[t] * torch.sin(x) + process.posterior_variance[t] ** 0.5 * noise
    assert error(images.numpy(), x.numpy()) < 1e-5
    assert not model.known[0].any()


def test_inversion_and_flow():
    """Inversion does not clip its x0; the network still gets one in [−1, 1]."""
    model = SelfConditioning()
    sampler = Sampler(model, make_process("v"), SHAPE, steps=6)
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x_T, _ = sampler.invert(images)
    assert len(model.known) == 6
    assert not model.known[0].any()
    assert all(known.abs().max() <= 1 for known in model.known)
    assert model.known[-1].any()
    assert torch.isfinite(x_T).all()
    flow = Sampler(SelfConditioning(), FlowProcess(100), SHAPE, solver="euler", steps=6, clip=None)
    with torch.no_grad():
        expected = run_table(flow.model.evaluate_known, flow.program, reference.x_T(2, SHAPE, 0), 0)
    assert error(flow.sample(2).numpy(), expected[-1][0]) < 1e-5


def test_which_programs_need_no_further_pass():
    process = make_process()
    for name, options, own in [
        ("ddim", {}, True),
        ("dpmpp_2m", {"threshold": (0.9, 2.0)}, True),
        ("ddim", {"clip": None}, False),
        ("ddim", {"clip": (-2, 2)}, False),
        ("euler", {"s_churn": 3.0}, False),  # its first row calls no network
    ]:
        assert (self_conditioned(build(name, process, 5, **options)).x0_program is None) == own, (name, options)


def test_a_unet_is_given_its_x0():
    """Other images than without, equal to those of a function that hands on x0 itself; channels last and guidance."""
    torch.manual_seed(0)
    config = UNetConfig(1, 8, (1,), 1, num_groups=4, num_classes=2, null_label=True, self_condition=True)
    model = UNet(config).to(memory_format=torch.channels_last)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    process = make_process("x0")
    arguments = {"shape": (1, 8, 8), "steps": 4, "guidance_scale": 2.0}
    images = Sampler(model, process, **arguments).sample(2, labels=[0, 1])
    known = []

    @torch.no_grad()
    def function(x, t, y):
        both = model(x, t, y, known[-1] if known else None)
        guided = (both[:2] + 2 * (both[2:] - both[:2])).clamp(-1, 1)
        known.append(torch.cat([guided, guided]))
        return both

    expected = Sampler(function, process, null_label=2, **arguments).sample(2, labels=[0, 1])
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    blind = Sampler(lambda x, t, y: model(x, t, y), process, null_label=2, **arguments)
    assert (blind.sample(2, labels=[0, 1]) - images).abs().max() > 1e-3
