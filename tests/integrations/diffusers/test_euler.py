"""EulerDiscreteScheduler against diffusers: stored trajectories, every option, churn, and tables that users give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden_data import error
from tests.integrations.diffusers import cases
from tests.integrations.diffusers.cases import (
    check_golden,
    compare_steps,
    golden_cases,
    key_of,
    pair,
    pairwise,
)

NAME = "EulerDiscreteScheduler"
OPTIONS = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "num_train_timesteps": [1000, 100, 37],
    "prediction_type": ["epsilon", "sample", "v_prediction", "original_sample"],
    "interpolation_type": ["linear", "log_linear"],
    "spacing": [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"],
    "sigma_min": [None, 0.05],
    "sigma_max": [None, 0.4],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "timestep_type": ["discrete", "continuous"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
}


def with_flag(config):
    """`spacing` as the flag that it is."""
    config = dict(config)
    flag = config.pop("spacing", None)
    return config | ({flag: True} if flag else {})


CONFIGS = [with_flag(config) for config in pairwise(OPTIONS)]


@pytest.mark.parametrize("case", golden_cases(NAME), ids=key_of)
def test_golden(case):
    check_golden(cases.ours.EulerDiscreteScheduler, case)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("churn", [{}, {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 8.0, "s_noise": 1.01}], ids=str)
def test_every_option_as_diffusers(config, churn):
    compare_steps(NAME, config, steps=9, step_kwargs=churn, tolerance=2e-6, x0_from_state=True)


@pytest.mark.parametrize("churn", [{}, {"s_churn": 20.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, churn):
    config = {"timestep_spacing": "leading"}
    compare_steps(NAME, config, dtype=dtype, step_kwargs=churn, tolerance=2e-6, x0_from_state=True)


@pytest.mark.parametrize("memory_format", [None, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 9), (2, 4, 3, 5)])
@pytest.mark.parametrize("churn", [{}, {"s_churn": 2.0}], ids=str)
def test_shapes_and_formats(shape, memory_format, churn):
    kwargs = {"step_kwargs": churn, "shape": shape, "memory_format": memory_format}
    compare_steps(NAME, **kwargs, tolerance=2e-6, x0_from_state=True)


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 4, 5, 3)])
def test_other_ranks(shape):
    compare_steps(NAME, shape=shape, step_kwargs={"s_churn": 2.0}, tolerance=2e-6, x0_from_state=True)


def test_lists_of_generators():
    kwargs = {"step_kwargs": {"s_churn": 2.0}, "seeds": [3, 4], "x0_from_state": True}
    compare_steps(NAME, **kwargs, tolerance=2e-6)


@pytest.mark.parametrize("begin", [3, 7])
def test_a_run_that_begins_later(begin):
    compare_steps(NAME, {"use_karras_sigmas": True}, begin=begin, tolerance=2e-6, x0_from_state=True)


@pytest.mark.parametrize(
    "custom",
    [
        {"timesteps": [900, 700, 300, 100, 0]},
        {"timesteps": [999.0, 666.5, 333.25, 0.0]},
        {"sigmas": [9.0, 4.0, 1.5, 0.2, 0.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_custom_schedules(custom, prediction):
    compare_steps(NAME, {"prediction_type": prediction}, steps=custom, tolerance=2e-6, x0_from_state=True)


def test_churn_is_within_its_levels_as_users_see_them():
    """s_tmax as a user reads it off `sigmas`, in float32, is the level itself, not below it."""
    theirs, mine = pair(NAME)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(6)
    bound = mine.sigmas[2].item()
    x = torch.randn(1, 2, 4, 4) * 10
    for i, t in enumerate(mine.timesteps):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        for scheduler, generator in zip((theirs, mine), generators, strict=True):
            scheduler.scale_model_input(x, t)
            scheduler.step(0.1 * x, t, x, s_churn=1.0, s_tmax=bound, generator=generator)
        fresh = torch.Generator().manual_seed(1).get_state()
        assert [bool((g.get_state() != fresh).any()) for g in generators] == [i >= 2] * 2


def test_counted_noise_churns_as_much():
    """noise="philox" adds √(σ̂²−σ²)·s_noise times unit normals to x̂, and x0 has its part of them."""
    scheduler = cases.ours.EulerDiscreteScheduler(noise="philox")
    scheduler.set_timesteps(10)
    x, t = torch.zeros(4, 3, 64, 64), scheduler.timesteps[0]
    scheduler.scale_model_input(x, t)
    out = scheduler.step(
        torch.zeros_like(x), t, x, s_churn=2.0, s_noise=1.5, generator=torch.Generator().manual_seed(0)
    )
    sigma = scheduler._levels[0]
    expected = 1.5 * sigma * np.sqrt(1.2**2 - 1)
    assert torch.equal(out.prev_sample, out.pred_original_sample)
    assert out.prev_sample.std().item() == pytest.approx(expected, rel=0.01)
    assert abs(out.prev_sample.mean().item()) < 0.02 * expected


def test_velocity_belongs_to_the_timestep():
    """diffusers looks ᾱ up by the timestep's place in the schedule."""
    scheduler = cases.ours.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    x0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    timesteps = scheduler.timesteps[[2, 5, 9]]
    levels = scheduler._levels[[2, 5, 9]].reshape(-1, 1, 1, 1)
    expected = (eps.double().numpy() - levels * x0.double().numpy()) / np.sqrt(levels**2 + 1)
    assert error(scheduler.get_velocity(x0, eps, timesteps).numpy(), expected) < 1e-6
    with pytest.raises(ValueError, match=r"timesteps are torch\.int64"):
        scheduler.get_velocity(x0, eps, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("config", "call", "message"),
    [
        ({}, {}, "exactly one of num_inference_steps, timesteps, sigmas must be given"),
        ({}, {"num_inference_steps": 5, "sigmas": [1.0, 0.0]}, "exactly one of"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({}, {"num_inference_steps": 1001}, r"it must be an int in \[1, 1000\]"),
        ({}, {"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({}, {"timesteps": [1000, 3]}, "timesteps are"),
        ({}, {"sigmas": [1.0]}, "at least two levels above 0"),
        ({}, {"sigmas": [1.0, 0.0, 0.5]}, "at least two levels above 0"),
        ({"use_karras_sigmas": True}, {"timesteps": [900, 3]}, "timesteps cannot be given where"),
        (
            {"interpolation_type": "cubic"},
            {"num_inference_steps": 5},
            "interpolation_type is 'cubic'; it may be",
        ),
        ({"final_sigmas_type": "one"}, {"num_inference_steps": 5}, "final_sigmas_type is 'one'; it may be 'zero'"),
        ({"timestep_spacing": "odd"}, {"num_inference_steps": 5}, "timestep_spacing is 'odd'; it may be one of"),
    ],
)
def test_schedules_that_cannot_be(config, call, message):
    scheduler = cases.ours.EulerDiscreteScheduler(**config)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**call)


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="use_karras_sigmas, use_beta_sigmas are all True"):
        cases.ours.EulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ValueError, match="timestep_type is 'both'"):
        cases.ours.EulerDiscreteScheduler(timestep_type="both")
    scheduler = cases.ours.EulerDiscreteScheduler(prediction_type="score")
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="prediction_type is 'score'; it may be one of 'epsilon', 'sample'"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_the_same_tables_give_the_same_timesteps():
    """Given diffusers' float32 ᾱ, fractional timesteps are diffusers' to the last places of float32."""
    config = {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}
    theirs = cases.diffusers.EulerDiscreteScheduler(**config)
    mine = cases.ours.EulerDiscreteScheduler(**config)
    mine.alphas_cumprod = theirs.alphas_cumprod
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(25)
    np.testing.assert_allclose(mine.timesteps, theirs.timesteps, rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(mine.sigmas, theirs.sigmas, rtol=1e-5)
