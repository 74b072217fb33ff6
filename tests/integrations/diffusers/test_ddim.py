"""DDIMScheduler against diffusers: stored trajectories, every option, and steps from anywhere."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.diffusers import cases
from tests.integrations.diffusers.cases import check_golden, compare_steps, golden_cases, key_of, pairwise

OPTIONS = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "num_train_timesteps": [1000, 100, 37],
    "clip_sample": [True, False],
    "clip_sample_range": [1.0, 0.7],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.8],
    "sample_max_value": [1.0, 1.5],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "rescale_betas_zero_snr": [False, True],
}


# At zero terminal SNR, x0 cannot be had from eps: a step from there is an error.
CONFIGS = [c for c in pairwise(OPTIONS) if not (c["rescale_betas_zero_snr"] and c["prediction_type"] == "epsilon")]


@pytest.mark.parametrize("case", golden_cases("DDIMScheduler"), ids=key_of)
def test_golden(case):
    check_golden(cases.ours.DDIMScheduler, case, tolerance=2e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("eta", "clipped"), [(0.0, False), (0.6, True), (1.0, False)])
def test_every_option_as_diffusers(config, eta, clipped):
    kwargs = {"eta": eta, "use_clipped_model_output": clipped}
    compare_steps("DDIMScheduler", config, steps=9, step_kwargs=kwargs, tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype):
    compare_steps("DDIMScheduler", dtype=dtype, step_kwargs={"eta": 0.5}, tolerance=2e-6)
