"""DDPMScheduler against diffusers: stored trajectories, every option, and the variances that diffusers gets wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden_data import error
from tests.integrations.diffusers.cases import (
    check_golden,
    compare_steps,
    golden_cases,
    key_of,
    network,
    ours,
    pair,
    pairwise,
)

OPTIONS = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"],
    "num_train_timesteps": [1000, 100, 37],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned_range", "other", None],
    "clip_sample": [True, False],
    "clip_sample_range": [1.0, 0.7],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.8],
    "sample_max_value": [1.0, 1.5, 0.5],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
}
# At zero terminal SNR, x0 cannot be had from eps: a step from there is an error.
CONFIGS = [c for c in pairwise(OPTIONS) if not (c["rescale_betas_zero_snr"] and c["prediction_type"] == "epsilon")]
CUSTOM = [36, 30, 17, 5, 4, 1]


def channels_of(config):
    return {"learned_range": "range", "learned": "log"}.get(config.get("variance_type"))


@pytest.mark.parametrize("case", golden_cases("DDPMScheduler"), ids=key_of)
def test_golden(case):
    check_golden(ours.DDPMScheduler, case)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("steps", [9, {"timesteps": CUSTOM}], ids=["spaced", "custom"])
def test_every_option_as_diffusers(config, steps):
    compare_steps("DDPMScheduler", config, steps=steps, var=channels_of(config), tolerance=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"shape": (3, 1, 5, 7)},
        {"shape": (2, 4, 3, 6, 5)},
        {"shape": (0, 3, 8, 8)},
        {"memory_format": torch.channels_last},
        {"seeds": [3, 4]},
        {"seeds": [3], "shape": (1, 3, 8, 8)},
        {"shape": (300, 3, 32, 32), "steps": 2},
        {"config": {"variance_type": "learned_range"}, "var": "range", "dtype": torch.bfloat16},
        {"config": {"variance_type": "learned_range"}, "var": "range", "memory_format": torch.channels_last},
    ],
    ids=str,
)
def test_dtypes_shapes_and_generators(options):
    compare_steps("DDPMScheduler", options.pop("config", None), tolerance=2e-6, **options)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_before_set_timesteps_a_step_leads_to_the_timestep_below(t):
    theirs, mine = pair("DDPMScheduler")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    output = network(x, t)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = theirs.step(output, t, x, generator=draws[0])
    actual = mine.step(output, t, x, generator=draws[1])
    assert error(actual.prev_sample.numpy(), expected.prev_sample.numpy()) < 1e-12
    assert error(actual.pred_original_sample.numpy(), expected.pred_original_sample.numpy()) < 1e-12
    assert mine.previous_timestep(t) == t - 1


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned"])
def test_variances_that_diffusers_gets_wrong(variance_type):
    """x' − mean is z·σ with σ² = β, or the exponential of the network's channels."""
    scheduler = ours.DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(20)
    mean_of = ours.DDPMScheduler()
    mean_of.set_timesteps(20)
    for one in (scheduler, mean_of):
        one.alphas_cumprod = one.alphas_cumprod.double()  # to reckon with in float64
    t, t_prev = scheduler.timesteps[7:9].tolist()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    output = network(x, t, var=channels_of({"variance_type": variance_type}))
    z = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    step = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(2)).prev_sample
    small = mean_of.step(output[:, :3], t, x, generator=torch.Generator().manual_seed(2)).prev_sample
    abar, abar_prev = scheduler._abar[t], scheduler._abar[t_prev]
    beta = 1 - abar / abar_prev
    mean = small - z * np.sqrt((1 - abar_prev) / (1 - abar) * beta)
    sigma = output[:, 3:].mul(0.5).exp() if variance_type == "learned" else np.sqrt(beta)
    assert error(step.numpy(), (mean + sigma * z).numpy()) < 1e-12


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "other"])
def test_get_variance(kind):
    theirs, mine = pair("DDPMScheduler", {"variance_type": kind})
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    for t in mine.timesteps:
        torch.testing.assert_close(mine._get_variance(t).double(), theirs._get_variance(t), rtol=1e-6, atol=0)
        assert mine._get_variance(int(t)) == mine._get_variance(t)


def test_get_variance_of_learned_ones():
    theirs, mine = pair("DDPMScheduler")
    channels = torch.rand(2, 3, 4, 4)
    for kind in ("learned", "learned_range"):
        expected = theirs._get_variance(500, channels, kind)
        torch.testing.assert_close(mine._get_variance(500, channels, kind).double(), expected.double())
    with pytest.raises(ValueError, match="predicted_variance is None"):
        mine._get_variance(500, None, "learned_range")


def test_threshold_sample():
    theirs, mine = pair("DDPMScheduler", {"sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9})
    x = torch.randn(3, 3, 8, 8) * torch.tensor([0.1, 1.0, 4.0]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(mine._threshold_sample(x), theirs._threshold_sample(x))


def test_previous_timestep():
    theirs, mine = pair("DDPMScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(timesteps=[900, 300, 12])
    for t in (900, 300, 12):
        assert int(mine.previous_timestep(t)) == int(theirs.previous_timestep(t))
    assert mine.custom_timesteps
    with pytest.raises(ValueError, match="timestep is 5"):
        mine.previous_timestep(5)


def test_noise_of_a_counter():
    """Unit normals, which follow from the generator, and in a list from each sample's own."""
    scheduler = ours.DDPMScheduler(variance_type="fixed_large", clip_sample=False, noise="philox")
    scheduler.set_timesteps(1000)
    t = scheduler.timesteps[500]
    x = torch.zeros(4, 3, 64, 64)

    def noise(generator, n=4):
        return scheduler.step(x[:n], t, x[:n], generator=generator).prev_sample / scheduler.betas[499].sqrt()

    z = noise(torch.Generator().manual_seed(0))
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
    assert torch.equal(z, noise(torch.Generator().manual_seed(0)))
    assert not torch.equal(z, noise(torch.Generator().manual_seed(1)))
    four, two = (noise([torch.Generator().manual_seed(s) for s in seeds], n=len(seeds)) for seeds in (range(4), (2, 3)))
    assert torch.equal(four[2:], two)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": -3}, r"\[1, 1000\]"),
        ({"num_inference_steps": 1001}, "1001"),
        ({"num_inference_steps": 10.5}, "10.5"),
        ({}, "num_inference_steps is None"),
        ({"num_inference_steps": 3, "timesteps": [2, 1, 0]}, "both given"),
        ({"timesteps": [3, 5, 1]}, "falling"),
        ({"timesteps": [5, 5, 1]}, "falling"),
        ({"timesteps": [1000, 3]}, "1000"),
        ({"timesteps": [5, -1]}, "falling"),
        ({"timesteps": [5.5, 1.0]}, "whole"),
        ({"timesteps": [float("nan")]}, "whole"),
        ({"timesteps": []}, "whole"),
    ],
    ids=str,
)
def test_timesteps_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ours.DDPMScheduler().set_timesteps(**kwargs)


def test_bad_input():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="'fixed_small', 'fixed_small_log', 'fixed_large'"):
        ours.DDPMScheduler(variance_type="small").step(x, 5, x)
    with pytest.raises(ValueError, match="'epsilon', 'sample', 'v_prediction'"):
        ours.DDPMScheduler(prediction_type="eps").step(x, 5, x)
    with pytest.raises(NotImplementedError, match="sigmoid"):
        ours.DDPMScheduler(beta_schedule="cosine")
    with pytest.raises(ValueError, match="noise is 'gauss'"):
        ours.DDPMScheduler(noise="gauss")
    with pytest.raises(ValueError, match="model_output"):
        ours.DDPMScheduler(variance_type="learned").step(x, 5, x)
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(10)
    for t in (5, -1, 1000, 900.5, float("nan"), torch.tensor(7)):
        with pytest.raises(ValueError, match="timestep is"):
            scheduler.step(x, t, x)
    zero_snr = ours.DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="'epsilon' needs a schedule that stays above 0"):
        zero_snr.step(x, 999, x)
    assert zero_snr.step(x, 998, x).prev_sample.isfinite().all()


def test_betas_above_1_matter_only_where_they_are():
    """diffusers' own tests have a schedule with β up to 2."""
    scheduler = ours.DDPMScheduler(beta_start=0.1, beta_end=2)
    x = torch.randn(1, 3, 4, 4)
    assert scheduler.step(x, 0, x).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="timestep is 999"):
        scheduler.step(x, 999, x)
