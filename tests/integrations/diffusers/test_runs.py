"""Whole runs in float32, ours on our own samples and diffusers' on its own: the errors of all steps together."""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.golden_data import error
from tests.integrations.diffusers.cases import diffusers, network, ours

CONFIGS = {
    "DDPMScheduler": [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"variance_type": "fixed_large"}],
    "DDIMScheduler": [{}, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}],
    "PNDMScheduler": [{}, {"skip_prk_steps": True}],
    "DPMSolverMultistepScheduler": [{}, {"use_karras_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"}],
    "UniPCMultistepScheduler": [{}, {"solver_order": 3}],
    "EulerDiscreteScheduler": [{}, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}],
    "EulerAncestralDiscreteScheduler": [{}],
    "HeunDiscreteScheduler": [{}, {"timestep_spacing": "trailing"}],
}


def run(scheduler, steps):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=generator) * scheduler.init_noise_sigma
    taken = inspect.signature(scheduler.step).parameters
    source = {"generator": generator} if "generator" in taken else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, **source).prev_sample
    return x


@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize(("name", "config"), [(n, c) for n, cs in CONFIGS.items() for c in cs], ids=str)
def test_the_same_images(name, config, steps):
    theirs, mine = (run(getattr(module, name)(**config), steps) for module in (diffusers, ours))
    assert error(mine.numpy(), theirs.numpy()) < 1e-5


def test_a_thousand_ancestral_steps():
    """A step's β is good to 3e-4 in diffusers' float32: only with its very roundings do so many steps agree."""
    theirs, mine = (run(module.DDPMScheduler(), 1000) for module in (diffusers, ours))
    assert error(mine.numpy(), theirs.numpy()) < 1e-5
