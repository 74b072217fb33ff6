"""EulerAncestralDiscreteScheduler against diffusers: stored trajectories, every option, its noise."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.diffusers import cases
from tests.integrations.diffusers.cases import check_golden, compare_steps, golden_cases, key_of, pairwise

NAME = "EulerAncestralDiscreteScheduler"
OPTIONS = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "num_train_timesteps": [1000, 100, 37],
    "prediction_type": ["epsilon", "v_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
}


@pytest.mark.parametrize("case", golden_cases(NAME), ids=key_of)
def test_golden(case):
    check_golden(cases.ours.EulerAncestralDiscreteScheduler, case)


@pytest.mark.parametrize("config", pairwise(OPTIONS), ids=str)
@pytest.mark.parametrize("steps", [1, 9])
def test_every_option_as_diffusers(config, steps):
    compare_steps(NAME, config, steps=steps, tolerance=2e-6, x0_from_state=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype):
    compare_steps(NAME, dtype=dtype, tolerance=2e-6, x0_from_state=True)


@pytest.mark.parametrize("memory_format", [None, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 9)])
@pytest.mark.parametrize("seeds", [5, "list"])
def test_shapes_formats_and_generators(shape, memory_format, seeds):
    seeds = list(range(shape[0])) if seeds == "list" else seeds
    kwargs = {"shape": shape, "memory_format": memory_format, "seeds": seeds}
    compare_steps(NAME, **kwargs, tolerance=2e-6, x0_from_state=True)


def test_a_run_that_begins_later():
    compare_steps(NAME, begin=4, tolerance=2e-6, x0_from_state=True)


def test_counted_noise_is_as_strong():
    """noise="philox": from the same x and output, σ_up times unit normals are added, the same from the same seed."""
    scheduler = cases.ours.EulerAncestralDiscreteScheduler(noise="philox")
    scheduler.set_timesteps(10)
    x, t = torch.zeros(4, 3, 64, 64), scheduler.timesteps[0]
    drawn = []
    for seed in (0, 0, 1):
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        scheduler.scale_model_input(x, t)
        generator = torch.Generator().manual_seed(seed)
        drawn.append(scheduler.step(torch.zeros_like(x), t, x, generator=generator).prev_sample)
    now, then = scheduler._levels[:2]
    up = (then**2 * (now**2 - then**2) / now**2) ** 0.5
    assert drawn[0].std().item() == pytest.approx(up, rel=0.01)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_predictions_that_it_does_not_know():
    x = torch.randn(1, 2, 4, 4)
    for prediction, error in (("sample", NotImplementedError), ("score", ValueError)):
        scheduler = cases.ours.EulerAncestralDiscreteScheduler(prediction_type=prediction)
        with pytest.raises(
            error, match=f"prediction_type is '{prediction}'; it may be one of 'epsilon', 'v_prediction'"
        ):
            scheduler.step(x, scheduler.timesteps[0], x)
