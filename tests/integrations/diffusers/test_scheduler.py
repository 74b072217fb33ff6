"""What all schedulers share: configs, copies, tables and timesteps that users replace, no waiting for the host."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from diffkern.backends import use_backend
from tests.golden_data import error
from tests.integrations.diffusers.cases import HostRead, diffusers, no_host_reads, ours, pair

SINGLE_STEP = ["DDPMScheduler", "DDIMScheduler"]


def step(scheduler, t, x, seed=0, **kwargs):
    """One step at which the network said sin x."""
    return scheduler.step(x.sin(), t, x, generator=torch.Generator().manual_seed(seed), **kwargs)


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SINGLE_STEP)
def test_configs_go_both_ways(name, tmp_path):
    config = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1, "trained_betas": None}
    theirs, mine = getattr(diffusers, name)(**config), getattr(ours, name)(**config, noise="philox")
    assert dict(mine.config) == dict(theirs.config)
    assert dict(getattr(ours, name).from_config(theirs.config).config) == dict(theirs.config)
    assert dict(getattr(diffusers, name).from_config(mine.config).config) == dict(theirs.config)
    other = diffusers.EulerDiscreteScheduler.from_config(mine.config)
    assert other.config.beta_schedule == "scaled_linear"
    mine.save_pretrained(tmp_path)
    for cls in (getattr(ours, name), getattr(diffusers, name)):
        assert dict(cls.from_pretrained(tmp_path).config)["clip_sample"] is False
    assert getattr(diffusers, name) in mine.compatibles
    assert diffusers.EulerDiscreteScheduler in mine.compatibles


def test_noise_is_an_attribute(tmp_path):
    scheduler = ours.DDPMScheduler(noise="philox")
    assert scheduler.noise == "philox"
    assert "noise" not in scheduler.config
    scheduler.save_pretrained(tmp_path)
    assert ours.DDPMScheduler.from_pretrained(tmp_path).noise == "torch"
    assert ours.DDPMScheduler.from_pretrained(tmp_path, noise="philox").noise == "philox"
    assert ours.DDPMScheduler.from_config(scheduler.config, noise="philox").noise == "philox"
    with pytest.raises(ValueError, match="'torch', 'philox'"):
        ours.DDPMScheduler.from_config(scheduler.config, noise="other")


def pickled(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


def saved(scheduler):
    file = io.BytesIO()
    torch.save(scheduler, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("name", SINGLE_STEP)
def test_copies_step_alike(name, copied, x):
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(10)
    expected = step(scheduler, scheduler.timesteps[3], x)
    twin = copied(scheduler)
    with no_host_reads():
        actual = step(twin, twin.timesteps[3], x)
    assert torch.equal(actual.prev_sample, expected.prev_sample)
    twin.set_timesteps(5)
    assert not torch.equal(step(twin, 800, x).prev_sample, expected.prev_sample)
    assert torch.equal(step(scheduler, scheduler.timesteps[3], x).prev_sample, expected.prev_sample)


def test_a_config_that_changes(x):
    """diffusers' pipelines rewrite configs that they think outdated."""
    theirs, mine = pair("DDIMScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        step(scheduler, 900, x)
        scheduler.register_to_config(clip_sample=False)
    expected, actual = step(theirs, 900, x).prev_sample, step(mine, 900, x).prev_sample
    assert error(actual.numpy(), expected.numpy()) < 2e-6


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("name", SINGLE_STEP)
def test_no_host_reads(name, noise, x):
    scheduler = getattr(ours, name)(noise=noise)
    scheduler.set_timesteps(10)
    with no_host_reads():
        for t in scheduler.timesteps:
            step(scheduler, t, x)
        step(scheduler, 900, x)
        for t in scheduler.timesteps[4:]:  # as image-to-image pipelines slice them
            step(scheduler, t, x)
        step(scheduler, scheduler.timesteps[2:3], x)
        with pytest.raises(HostRead):
            step(scheduler, scheduler.timesteps[2].clone(), x)


@pytest.mark.parametrize("kind", [int, float, np.int64, torch.tensor, lambda t: torch.tensor([t]), torch.Tensor.clone])
@pytest.mark.parametrize("name", SINGLE_STEP)
def test_every_way_to_say_a_timestep(name, kind, x):
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    expected = step(scheduler, t, x).prev_sample
    given = kind(t if kind is torch.Tensor.clone else int(t))
    assert torch.equal(step(scheduler, given, x).prev_sample, expected)
    with pytest.raises(ValueError, match="it must be one number"):
        step(scheduler, torch.tensor([900, 900]), x)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: setattr(s, "timesteps", s.timesteps[4:]),
        lambda s: setattr(s, "timesteps", s.timesteps[::2]),
        lambda s: setattr(s, "timesteps", torch.tensor([801, 402, 3])),
        lambda s: s.timesteps.sub_(1),
    ],
    ids=["sliced", "strided", "assigned", "written to"],
)
def test_replaced_timesteps(change, x):
    """A step leads to the next of the new ones."""
    theirs, mine = pair("DDPMScheduler", {"steps_offset": 1})
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        step(scheduler, scheduler.timesteps[5], x)
        change(scheduler)
    for t, same in zip(theirs.timesteps, mine.timesteps, strict=True):
        expected, actual = step(theirs, t, x), step(mine, same, x)
        assert error(actual.prev_sample.numpy(), expected.prev_sample.numpy()) < 2e-6


def test_number_of_steps_by_hand(x):
    theirs, mine = pair("DDIMScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        step(scheduler, 900, x)
        scheduler.num_inference_steps = 4
    expected, actual = step(theirs, 900, x).prev_sample, step(mine, 900, x).prev_sample
    assert error(actual.numpy(), expected.numpy()) < 2e-6


@pytest.mark.parametrize("write", ["assigned", "in place"])
@pytest.mark.parametrize("name", SINGLE_STEP)
def test_replaced_alphas_cumprod(name, write, x):
    theirs, mine = pair(name)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        step(scheduler, 900, x)
        scheduler.add_noise(x, x, torch.tensor([5, 6]))
        if write == "assigned":
            scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
        else:
            scheduler.alphas_cumprod *= 0.9
    expected, actual = step(theirs, 900, x).prev_sample, step(mine, 900, x).prev_sample
    assert error(actual.numpy(), expected.numpy()) < 5e-6  # a float32 table now: 1 − ᾱ is good to that
    expected, actual = (s.add_noise(x, x, torch.tensor([5, 6])) for s in (theirs, mine))
    assert error(actual.numpy(), expected.numpy()) < 5e-6


def test_alphas_cumprod_moved_keep_their_digits():
    scheduler = ours.DDPMScheduler()
    table = scheduler._abar
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("cpu", copy=True)
    assert scheduler._abar is table
    scheduler.alphas_cumprod = diffusers.DDPMScheduler(beta_schedule="sigmoid").alphas_cumprod
    assert scheduler._abar is not table


def test_replaced_final_alpha_cumprod(x):
    theirs, mine = pair("DDIMScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        step(scheduler, 0, x)
        scheduler.final_alpha_cumprod = torch.tensor(0.99995)
    expected, actual = step(theirs, 0, x).prev_sample, step(mine, 0, x).prev_sample
    assert error(actual.numpy(), expected.numpy()) < 2e-6
    assert mine.final_alpha_cumprod == torch.tensor(0.99995)


@pytest.mark.parametrize("name", SINGLE_STEP)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_results_have_the_promoted_dtype(name, dtypes, x):
    theirs, mine = pair(name)
    results = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        output, sample = x.sin().to(dtypes[0]), x.to(dtypes[1])
        results.append(scheduler.step(output, 900, sample, generator=torch.Generator().manual_seed(0)))
    assert results[1].prev_sample.dtype == results[0].prev_sample.dtype == torch.float32
    assert error(results[1].prev_sample.numpy(), results[0].prev_sample.numpy()) < 2e-3


@pytest.mark.parametrize("name", SINGLE_STEP)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backends(name, backend, x):
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(10)
    expected = step(scheduler, 900, x.double()).prev_sample
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    scheduler._noise_source = lambda *_: {"noise": noise.float()}
    try:
        with use_backend(backend):
            actual = step(scheduler, 900, x).prev_sample
    except RuntimeError as error_:
        pytest.skip(str(error_))
    assert error(actual.numpy(), expected.numpy()) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SINGLE_STEP)
def test_modes(name, mode, x):
    expected = None
    for context in (torch.enable_grad, mode):
        with context():
            scheduler = getattr(ours, name)()
            scheduler.set_timesteps(10)
            result = step(scheduler, scheduler.timesteps[1], x).prev_sample
            expected = result if expected is None else expected
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", SINGLE_STEP)
def test_gradients_flow_as_through_diffusers(name, x):
    grads = []
    for scheduler in pair(name):
        scheduler.set_timesteps(10)
        leaves = [x.double().requires_grad_(), x.double().cos().requires_grad_()]
        result = scheduler.step(leaves[1], 500, leaves[0], generator=torch.Generator().manual_seed(0))
        result.prev_sample.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for theirs, mine in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", SINGLE_STEP)
def test_under_torch_compile(name, x):
    """A compiled function goes around the step, of a scheduler that has made none yet."""
    results = []
    for transform in (lambda function: torch.compile(function, backend="aot_eager"), lambda function: function):
        scheduler = getattr(ours, name)()
        scheduler.set_timesteps(10)

        def noise_and_step(x, t, scheduler=scheduler):
            noisy = scheduler.add_noise(x, x.cos(), t)
            return scheduler.step(noisy.sin(), t, noisy, return_dict=False)[0] * 2

        torch.manual_seed(0)
        results.append([transform(noise_and_step)(x, t) for t in scheduler.timesteps[2:4]])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_step_returns_what_diffusers_returns(x):
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(10)
    output = step(scheduler, 900, x)
    assert list(output.keys()) == ["prev_sample", "pred_original_sample"]
    assert output[0] is output.prev_sample is output["prev_sample"]
    pair_ = step(scheduler, 900, x, return_dict=False)
    assert isinstance(pair_, tuple)
    assert torch.equal(pair_[1], output.pred_original_sample)


@pytest.mark.parametrize("name", [*SINGLE_STEP, "DDIMInverseScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 2, 4, 5, 6), (3, 8)])
@pytest.mark.parametrize(
    "times", [torch.tensor([0, 1, 999]), torch.tensor([7]), torch.tensor(7), torch.tensor([3] * 3)]
)
def test_add_noise_and_velocity(name, dtype, shape, times):
    """Within half a unit of the last place of the true values: diffusers rounds its tables to the data's dtype."""
    scheduler = getattr(ours, name)()
    x0, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
    abar = torch.tensor(scheduler._abar)[times].reshape(-1, *[1] * (len(shape) - 1))
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    pairs = [(scheduler.add_noise(x0, noise, times), abar.sqrt() * x0 + (1 - abar).sqrt() * noise)]
    if name != "DDIMInverseScheduler":
        velocity = abar.sqrt() * noise - (1 - abar).sqrt() * x0
        pairs.append((scheduler.get_velocity(x0, noise, times), velocity))
    for actual, expected in pairs:
        assert actual.dtype == dtype
        assert error(actual.double().numpy(), expected.numpy()) < tolerance


def test_add_noise_of_mixed_tensors():
    """One image and many noises; a dtype each: as diffusers promotes and broadcasts them."""
    theirs, mine = pair("DDPMScheduler")
    x0, noise = torch.randn(1, 3, 4, 4), torch.randn(5, 3, 4, 4).half()
    times = torch.arange(5)
    expected, actual = (s.add_noise(x0, noise, times) for s in (theirs, mine))
    assert actual.dtype == expected.dtype == torch.float32
    assert error(actual.numpy(), expected.numpy()) < 2e-6


@pytest.mark.parametrize("times", [torch.tensor([0.5, 3.0]), torch.tensor([float("nan")]), torch.tensor([1, 2, 3])])
def test_add_noise_refuses_other_timesteps(times, x):
    with pytest.raises(ValueError, match="timesteps are"):
        ours.DDIMScheduler().add_noise(x, x, times)


@pytest.mark.parametrize("times", [torch.tensor([-1, 0]), torch.tensor([0, 1000])])
def test_add_noise_refuses_timesteps_outside_the_process(times, x):
    with pytest.raises(ValueError, match="1000"):
        ours.DDIMScheduler().add_noise(x, x, times)


def test_generators_that_do_not_fit(x):
    scheduler = ours.DDPMScheduler()
    with pytest.raises(ValueError, match="list of 3"):
        scheduler.step(x, 900, x, generator=[torch.Generator() for _ in range(3)])
    ddim = ours.DDIMScheduler()
    ddim.set_timesteps(10)
    with pytest.raises(ValueError, match="both given"):
        ddim.step(x, 900, x, eta=0.5, generator=torch.Generator(), variance_noise=x)
