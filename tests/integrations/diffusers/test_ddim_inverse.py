"""DDIMInverseScheduler against diffusers, and as the inverse that it is."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.diffusers.cases import compare_steps, ours, pairwise

OPTIONS = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "num_train_timesteps": [1000, 100, 37],
    "clip_sample": [True, False],
    "clip_sample_range": [1.0, 0.7],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["leading", "trailing"],
    "rescale_betas_zero_snr": [False, True],
}
# Of an image without noise ε cannot be had from x0: such a step is an error.
CONFIGS = [c for c in pairwise(OPTIONS) if not (c["prediction_type"] == "sample" and c["set_alpha_to_one"])]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_option_as_diffusers(config):
    compare_steps("DDIMInverseScheduler", config, steps=9, seeds=None, tolerance=2e-6)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}], ids=str)
def test_dtypes_and_layouts(options):
    compare_steps("DDIMInverseScheduler", seeds=None, tolerance=2e-6, **options)


def test_inverts_ddim():
    """With what the network says held fixed, DDIM's steps undo the inverse's."""
    forward, inverse = (cls(clip_sample=False) for cls in (ours.DDIMScheduler, ours.DDIMInverseScheduler))
    x0 = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    eps = torch.randn_like(x0)
    for scheduler in (forward, inverse):
        scheduler.set_timesteps(20)
    x = x0
    for t in inverse.timesteps:
        x = inverse.step(eps, t, x).prev_sample
    for t in forward.timesteps:
        x = forward.step(eps, t, x).prev_sample
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-12)


def test_old_name_and_further_arguments():
    assert ours.DDIMInverseScheduler(set_alpha_to_zero=False).initial_alpha_cumprod < 1
    assert ours.DDIMInverseScheduler(set_alpha_to_one=False).initial_alpha_cumprod < 1
    assert ours.DDIMInverseScheduler(thresholding=True).initial_alpha_cumprod == 1


def test_bad_input():
    x = torch.randn(1, 3, 4, 4)
    scheduler = ours.DDIMInverseScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="'leading', 'trailing'"):
        ours.DDIMInverseScheduler(timestep_spacing="linspace").set_timesteps(5)
    scheduler = ours.DDIMInverseScheduler(prediction_type="sample")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="'sample' one that stays below 1"):
        scheduler.step(x, 0, x)
