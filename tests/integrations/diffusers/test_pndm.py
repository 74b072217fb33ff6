"""PNDMScheduler against diffusers: stored trajectories, every option, its history."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.diffusers import cases
from tests.integrations.diffusers.cases import check_golden, compare_steps, golden_cases, key_of, pair, pairwise

NAME = "PNDMScheduler"
OPTIONS = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "num_train_timesteps": [1000, 100, 37],
    "skip_prk_steps": [False, True],
    "set_alpha_to_one": [False, True],
    "prediction_type": ["epsilon", "v_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
}


@pytest.mark.parametrize("case", golden_cases(NAME), ids=key_of)
def test_golden(case):
    check_golden(cases.ours.PNDMScheduler, case)


@pytest.mark.parametrize("config", pairwise(OPTIONS), ids=str)
@pytest.mark.parametrize("steps", [4, 7, 12])
def test_every_option_as_diffusers(config, steps):
    compare_steps(NAME, config, steps=steps, seeds=None, tolerance=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(steps):
    compare_steps(NAME, {"skip_prk_steps": True}, steps=steps, seeds=None, tolerance=2e-6)
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}; `num_inference_steps` must be >= 4"):
        cases.ours.PNDMScheduler().set_timesteps(steps)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, skip):
    """The sum that Runge–Kutta collects has the sample's dtype, as in diffusers, which has it in float64 here."""
    compare_steps(NAME, {"skip_prk_steps": skip}, dtype=dtype, seeds=None, tolerance=float(torch.finfo(dtype).eps))


@pytest.mark.parametrize("memory_format", [None, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 9), (2, 6)])
@pytest.mark.parametrize("skip", [False, True])
def test_shapes_and_formats(shape, memory_format, skip):
    if memory_format is None or len(shape) == 4:
        kwargs = {"shape": shape, "memory_format": memory_format, "seeds": None}
        compare_steps(NAME, {"skip_prk_steps": skip}, **kwargs, tolerance=2e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_its_history_is_diffusers(skip):
    theirs, mine = pair(NAME, {"skip_prk_steps": skip})
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(6)
    assert mine.pndm_order == theirs.pndm_order
    assert mine.prk_timesteps.tolist() == theirs.prk_timesteps.tolist()
    assert mine.plms_timesteps.tolist() == theirs.plms_timesteps.tolist()
    assert mine._timesteps.tolist() == theirs._timesteps.tolist()
    x = torch.randn(1, 2, 4, 4)
    for t in mine.timesteps:
        output = torch.randn(1, 2, 4, 4)
        for scheduler in (theirs, mine):
            scheduler.step(output.clone(), t, x)
        assert mine.counter == theirs.counter
        assert len(mine.ets) == len(theirs.ets)
        assert all(torch.equal(a, b) for a, b in zip(mine.ets, theirs.ets, strict=True))
        assert (mine.cur_sample is None) == (theirs.cur_sample is None)
        torch.testing.assert_close(torch.as_tensor(mine.cur_model_output), torch.as_tensor(theirs.cur_model_output))


@pytest.mark.parametrize("method", ["step_prk", "step_plms"])
@pytest.mark.parametrize("counter", [0, 1, 2, 5])
@pytest.mark.parametrize("timestep", [0, 7, 500])
def test_steps_out_of_order_and_histories_from_elsewhere(method, counter, timestep):
    """Tests and pipelines assign `ets`, and call the two kinds of steps themselves."""
    theirs, mine = pair(NAME)
    x, output, *ets = (torch.randn(2, 3, 4, 4) for _ in range(6))
    states = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(20)
        scheduler.ets, scheduler.counter = ets[:], counter
        states.append(getattr(scheduler, method)(output, timestep, x, return_dict=False)[0])
    torch.testing.assert_close(states[1], states[0].float(), rtol=1e-5, atol=1e-5)


def test_a_replaced_end_takes_effect():
    theirs, mine = pair(NAME, {"skip_prk_steps": True})
    x, states = torch.randn(1, 2, 4, 4), []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(1)
        scheduler.step(x, 0, x)
        scheduler.set_timesteps(1)
        scheduler.final_alpha_cumprod = torch.tensor(0.7)
        states.append(scheduler.step(0.5 * x, 0, x).prev_sample)
    torch.testing.assert_close(states[1], states[0].float())


def test_what_cannot_be():
    scheduler, x = cases.ours.PNDMScheduler(), torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="num_inference_steps is None; call set_timesteps before step"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="ets has 0 outputs; step_plms needs 3"):
        scheduler.step_plms(x, 100, x)
    other = cases.ours.PNDMScheduler(skip_prk_steps=True, prediction_type="sample")
    other.set_timesteps(10)
    with pytest.raises(ValueError, match="prediction_type is 'sample'; it may be one of 'epsilon', 'v_prediction'"):
        other.step(x, 100, x)
    other = cases.ours.PNDMScheduler(skip_prk_steps=True)
    other.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep is 1000; it must be one of the schedule's"):
        other.step(x, 1000, x)
