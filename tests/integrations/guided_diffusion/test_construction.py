"""Schedules, spacings, flags, tables that are replaced, and what is refused."""

import enum
import itertools

import numpy as np
import pytest
import torch

from diffkern.integrations import guided_diffusion
from diffkern.integrations.guided_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    betas_for_alpha_bar,
    create_gaussian_diffusion,
    get_named_beta_schedule,
    space_timesteps,
)
from diffkern.integrations.guided_diffusion.gaussian_diffusion import _extract_into_tensor
from tests.golden_data import load
from tests.integrations.guided_diffusion.small import SHAPE, STEPS, diffusion, inputs, mean_model, model, seeded

GOLDEN = load("guided_gaussian")
SPACINGS = [name for name in GOLDEN.arrays.files if name.startswith("space_timesteps/")]


@pytest.mark.parametrize("name", SPACINGS)
def test_space_timesteps(name):
    total, sections = name.removeprefix("space_timesteps/T").split("_")
    text = sections.replace("-", ",")
    kept = space_timesteps(int(total), text)
    assert isinstance(kept, set)
    assert sorted(kept) == GOLDEN[name].tolist()
    if not text.startswith("ddim"):
        assert space_timesteps(int(total), [int(count) for count in text.split(",")]) == kept


def test_the_modules_of_the_replaced_package():
    for module, names in {
        "gaussian_diffusion": "GaussianDiffusion ModelMeanType ModelVarType LossType get_named_beta_schedule",
        "losses": "normal_kl approx_standard_normal_cdf discretized_gaussian_log_likelihood",
        "nn": "mean_flat",
        "resample": "create_named_schedule_sampler ScheduleSampler UniformSampler LossAwareSampler "
        "LossSecondMomentResampler",
        "respace": "SpacedDiffusion space_timesteps _WrappedModel",
        "script_util": "create_gaussian_diffusion",
    }.items():
        found = __import__(f"{guided_diffusion.__name__}.{module}", fromlist=names.split())
        assert all(hasattr(found, name) for name in names.split())


def test_schedules():
    np.testing.assert_allclose(get_named_beta_schedule("linear", 4000)[[0, -1]], [2.5e-5, 5e-3], rtol=1e-12)
    cosine = get_named_beta_schedule("cosine", 50)
    bar = [np.cos((u / 50 + 0.008) / 1.008 * np.pi / 2) ** 2 for u in range(51)]
    expected = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)]
    np.testing.assert_allclose(cosine, expected, rtol=1e-12)
    assert betas_for_alpha_bar(10, lambda u: 1 - u, max_beta=0.7)[-1] == 0.7


@pytest.mark.parametrize(
    ("flags", "mean", "variance", "loss"),
    [
        ({}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"sigma_small": True, "predict_xstart": True}, "START_X", "FIXED_SMALL", "MSE"),
        ({"learn_sigma": True, "rescale_learned_sigmas": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_MSE"),
        ({"learn_sigma": True, "sigma_small": True, "use_kl": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_KL"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_flags(flags, mean, variance, loss):
    d = create_gaussian_diffusion(steps=100, timestep_respacing="ddim25", **flags)
    assert (d.model_mean_type, d.model_var_type) == (ModelMeanType[mean], ModelVarType[variance])
    assert d.loss_type == LossType[loss]
    assert (d.num_timesteps, d.original_num_steps, d.rescale_timesteps) == (25, 100, False)
    assert d.timestep_map == list(range(0, 100, 4))
    assert create_gaussian_diffusion(steps=100).num_timesteps == 100
    assert d.loss_type.is_vb() == ("KL" in loss)


def test_full_shape_tables_at_t():
    x, t = inputs()
    d = diffusion(variance=ModelVarType.FIXED_LARGE)
    known = d.p_mean_variance(mean_model, x, t)
    values = _extract_into_tensor(d.alphas_cumprod, t, x.shape)
    for value in (known["variance"], known["log_variance"], *d.q_mean_variance(x, t)[1:], values):
        assert value.shape == x.shape
        assert value.dtype == torch.float32
        assert value[3, 2, 7, 7] == value[3, 0, 0, 0]
    np.testing.assert_allclose(values[:, 0, 0, 0], d.alphas_cumprod[t], rtol=1e-7)
    np.testing.assert_allclose(known["variance"][:, 0, 0, 0], [d.posterior_variance[1], *d.betas[t[1:]]], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_processes_of_a_step_or_two(steps):
    for variance in (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE):
        d = GaussianDiffusion(
            betas=[0.1, 0.4][:steps],
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=variance,
            loss_type=LossType.MSE,
        )
        network = model if variance == ModelVarType.LEARNED_RANGE else mean_model
        assert d.p_sample_loop(network, SHAPE).isfinite().all()
        assert d.ddim_sample_loop(network, SHAPE, eta=1.0).isfinite().all()


def test_replacing_a_table_takes_effect_and_writing_into_one_is_refused():
    x, t = inputs()
    d = diffusion(variance=ModelVarType.FIXED_SMALL)
    before, _ = seeded(d.p_sample, mean_model, x, t)
    with pytest.raises(ValueError, match="read-only"):
        d.posterior_log_variance_clipped[:] = 0
    d.posterior_log_variance_clipped = d.posterior_log_variance_clipped + np.log(4.0)
    after, _ = seeded(d.p_sample, mean_model, x, t)
    mean = d.p_mean_variance(mean_model, x, t)["mean"]
    torch.testing.assert_close(after["sample"] - mean, 2 * (before["sample"] - mean), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"betas has shape \(2, 2\)"):
        d.betas = np.ones((2, 2))


def test_the_timestep_map_is_read_at_every_step():
    seen = []
    d = diffusion(SpacedDiffusion, {2, 5, 11, 19})
    x, t = inputs(t=(0, 1, 2, 3))

    def network(x, t):
        seen.append(t.tolist())
        return model(x, t)

    d.p_sample(network, x, t)
    d.timestep_map[1] = 7
    d.p_sample(network, x, t)
    assert seen == [[2, 5, 11, 19], [2, 7, 11, 19]]


def test_zero_terminal_snr():
    """x0 can be sampled from pure noise by a network that predicts it, and not by one that predicts ε."""
    betas = [*get_named_beta_schedule("linear", 20)[:-1], 1.0]
    common = {"betas": betas, "model_var_type": ModelVarType.FIXED_SMALL, "loss_type": LossType.MSE}
    d = GaussianDiffusion(**common, model_mean_type=ModelMeanType.START_X)
    for sample in (d.p_sample_loop(mean_model, SHAPE), d.ddim_sample_loop(mean_model, SHAPE)):
        assert sample.isfinite().all()
    x, _ = inputs()
    d = GaussianDiffusion(**common, model_mean_type=ModelMeanType.EPSILON)
    with pytest.raises(ValueError, match=r"alphas_cumprod\[19\] = 0\.0.*use START_X"):
        d.p_sample(mean_model, x, torch.full((4,), 19))


BAD_T = [
    (torch.tensor([0, 1, 2, STEPS]), ValueError, r"t must lie in \[0, 20\), got 20 at position 3"),
    (torch.tensor([0, -1, 2, 3]), ValueError, r"t must lie in \[0, 20\), got -1 at position 1"),
    (torch.tensor([0, 1]), ValueError, r"t must have shape \(4,\).*got \(2,\)"),
    (torch.tensor([0.0, 1.0, 2.0, 3.0]), TypeError, "t must be int64, got float32"),
    (3, TypeError, "t must be an int64 tensor, got int"),
]


@pytest.mark.parametrize(("t", "kind", "message"), BAD_T)
def test_bad_timesteps(t, kind, message):
    x, _ = inputs()

    def uncalled(x, t):
        raise AssertionError("the network was asked before the timestep was looked at")

    d = diffusion(SpacedDiffusion, range(STEPS))
    for step in (d.p_sample, d.ddim_sample, d.ddim_reverse_sample, d.p_mean_variance):
        with pytest.raises(kind, match=message):
            step(uncalled, x, t)
    with pytest.raises(kind, match=message):
        d.q_posterior_mean_variance(x, x, t)
    with pytest.raises(kind, match=message):
        d.q_sample(x, t)


@pytest.mark.parametrize("given", [torch.tensor([7] * 4, dtype=torch.int32), torch.tensor([7])])
def test_timesteps_of_other_kinds_are_welcome(given):
    x, t = inputs(t=[7] * 4)
    expected, _ = seeded(diffusion().p_sample, model, x, t)
    assert torch.equal(seeded(diffusion().p_sample, model, x, given)[0]["sample"], expected["sample"])
    noise = torch.ones(SHAPE)
    assert torch.equal(diffusion().q_sample(x, given, noise), diffusion().q_sample(x, t, noise))


@pytest.mark.parametrize(
    ("variance", "network", "message"),
    [
        (ModelVarType.LEARNED, mean_model, r"\(4, 6, 8, 8\).*2C channels, the mean's and the variance's"),
        (ModelVarType.FIXED_SMALL, model, r"\(4, 3, 8, 8\).*for 2C set a learned model_var_type \(learn_sigma\)"),
    ],
)
def test_wrong_channels(variance, network, message):
    x, t = inputs()
    d = diffusion(variance=variance)
    for step in (d.p_sample, d.ddim_sample, d.ddim_reverse_sample, d.p_mean_variance):
        with pytest.raises(ValueError, match=message):
            step(network, x, t)


def test_bad_arguments():
    x, t = inputs()
    d = diffusion()
    with pytest.raises(ValueError, match="schedule_name is 'cubic'; it may be one of 'linear', 'cosine'"):
        get_named_beta_schedule("cubic", 10)
    with pytest.raises(ValueError, match=r"betas\[19\] is 1.5"):
        GaussianDiffusion(
            betas=[*get_named_beta_schedule("cosine", 19), 1.5],
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.LEARNED,
            loss_type=LossType.MSE,
        )
    with pytest.raises(ValueError, match="'ddim600': no integer stride takes 600 of 1000"):
        space_timesteps(1000, "ddim600")
    with pytest.raises(ValueError, match=r"timesteps must rise within \[0, 20\)"):
        diffusion(SpacedDiffusion, {3, 20})
    with pytest.raises(ValueError, match=r"timesteps are .*not empty"):
        diffusion(SpacedDiffusion, set())
    with pytest.raises(ValueError, match="noise is 'mine'; it may be one of 'torch', 'philox'"):
        diffusion(noise="mine")
    for eta in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"eta is {eta}; it must be in \[0, 1\]"):
            d.ddim_sample(model, x, t, eta=eta)
    with pytest.raises(ValueError, match=r"eta is 0\.5; it must be 0"):
        d.ddim_reverse_sample(model, x, t, eta=0.5)
    with pytest.raises(TypeError, match="shape must be a tuple or a list of sizes, got int"):
        d.p_sample_loop(model, 4)
    with pytest.raises(ValueError, match=r"noise must have shape"):
        d.q_sample(x, t, noise=x[:1])
    with pytest.raises(ValueError, match=r"x_start has shape \(1, 3, 8, 8\); it must be x_t's, \(4, 3, 8, 8\)"):
        d.q_posterior_mean_variance(x[:1], x, t)


@pytest.mark.parametrize("step", ["p_sample", "ddim_sample", "ddim_reverse_sample", "p_mean_variance"])
@pytest.mark.parametrize("name", ["model_mean_type", "model_var_type"])
def test_types_of_another_package_are_refused(name, step):
    theirs = enum.Enum("ModelMeanType", ["START_X", "FIXED_SMALL"])
    other = diffusion(mean=ModelMeanType.START_X, variance=ModelVarType.FIXED_SMALL)
    setattr(other, name, theirs.START_X if name == "model_mean_type" else theirs.FIXED_SMALL)
    known = "ModelMeanType.START_X" if name == "model_mean_type" else "ModelVarType.FIXED_SMALL"
    with pytest.raises(ValueError, match=rf"{name} is <.*it may be one of .*{known}"):
        getattr(other, step)(mean_model, *inputs())
