"""HeunDiscreteScheduler against diffusers: stored trajectories, every option, the state between its two calls."""

from __future__ import annotations

import pytest
import torch

from tests.golden_data import error
from tests.integrations.diffusers import cases
from tests.integrations.diffusers.cases import check_golden, compare_steps, golden_cases, key_of, pair, pairwise

NAME = "HeunDiscreteScheduler"
OPTIONS = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "exp"],
    "num_train_timesteps": [1000, 100, 37],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "spacing": [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 0.6],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
}


def with_flag(config):
    """`spacing` as the flag that it is."""
    flag = config["spacing"]
    return {name: value for name, value in config.items() if name != "spacing"} | ({flag: True} if flag else {})


@pytest.mark.parametrize("case", golden_cases(NAME), ids=key_of)
def test_golden(case):
    check_golden(cases.ours.HeunDiscreteScheduler, case)


@pytest.mark.parametrize("config", [with_flag(config) for config in pairwise(OPTIONS)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_every_option_as_diffusers(config, steps):
    compare_steps(NAME, config, steps=steps, seeds=None, tolerance=3e-6, x0_from_state=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype):
    """What is remembered is rounded to the sample's dtype, as in diffusers; here diffusers remembers float64."""
    compare_steps(NAME, dtype=dtype, seeds=None, tolerance=float(torch.finfo(dtype).eps), x0_from_state=True)


@pytest.mark.parametrize("memory_format", [None, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 9)])
def test_shapes_and_formats(shape, memory_format):
    kwargs = {"shape": shape, "memory_format": memory_format, "seeds": None}
    compare_steps(NAME, **kwargs, tolerance=3e-6, x0_from_state=True)


@pytest.mark.parametrize("begin", [0, 3, 4, 18])
def test_a_run_that_begins_later(begin):
    """Also in the middle of a step, where diffusers makes a step of no length."""
    compare_steps(NAME, begin=begin, seeds=None, tolerance=3e-6, x0_from_state=True)


@pytest.mark.parametrize("timesteps", [[901, 640, 200, 3], [999.0, 666.5, 333.25, 0.0]], ids=["whole", "fractions"])
def test_custom_timesteps(timesteps):
    steps = {"timesteps": timesteps}
    compare_steps(NAME, steps=steps, seeds=None, tolerance=3e-6, x0_from_state=True)


def test_the_state_between_the_two_calls_of_a_step():
    theirs, mine = pair(NAME, {"prediction_type": "v_prediction"})
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(4)
    theirs.sigmas = torch.tensor(mine._levels)
    assert mine.order == theirs.order == 2
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64) * float(mine.init_noise_sigma)
    for i, t in enumerate(mine.timesteps):
        assert mine.state_in_first_order == theirs.state_in_first_order == (i % 2 == 0)
        output = torch.randn(1, 2, 4, 4, dtype=torch.float64)
        x_next = [scheduler.step(output, t, x).prev_sample for scheduler in (theirs, mine)]
        assert mine.step_index == theirs.step_index == i + 1
        for name in ("prev_derivative", "dt", "sample"):
            expected, actual = getattr(theirs, name), getattr(mine, name)
            if expected is None:
                assert actual is None
            else:
                assert error(actual.numpy(), expected.numpy()) < 1e-6
        x = x_next[0]
    mine.set_timesteps(4)
    assert mine.state_in_first_order
    assert mine.sample is None


def test_a_step_corrects_whatever_became_of_the_state_between():
    """Pipelines mask and mix the state between two calls: only the derivative there sees that."""
    theirs, mine = pair(NAME)
    x, mixed, outputs = (torch.randn(2, 3, 4, 4) for _ in range(3))
    ends = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(4)
        scheduler.step(outputs, scheduler.timesteps[0], x)
        ends.append(scheduler.step(outputs * 2, scheduler.timesteps[1], mixed).prev_sample)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "call", "message"),
    [
        ({}, {}, "exactly one of num_inference_steps and timesteps must be given"),
        ({}, {"num_inference_steps": 5, "timesteps": [3]}, "exactly one of"),
        ({}, {"num_inference_steps": 1001}, r"it must be an int in \[1, 1000\]"),
        ({}, {"timesteps": [3, 5]}, "they must be numbers falling"),
        ({"use_beta_sigmas": True}, {"timesteps": [5, 3]}, "timesteps cannot be given where"),
    ],
)
def test_schedules_that_cannot_be(config, call, message):
    scheduler = cases.ours.HeunDiscreteScheduler(**config)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**call)
