"""DDIMScheduler against diffusers: stored trajectories, every option, and steps from anywhere."""

from __future__ import annotations

import pytest
import torch

from tests.golden_data import error
from tests.integrations.diffusers.cases import check_golden, compare_steps, golden_cases, key_of, ours, pair, pairwise

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
    "sample_max_value": [1.0, 1.5, 0.5],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "rescale_betas_zero_snr": [False, True],
}
# At zero terminal SNR, x0 cannot be had from eps: a step from there is an error.
CONFIGS = [c for c in pairwise(OPTIONS) if not (c["rescale_betas_zero_snr"] and c["prediction_type"] == "epsilon")]


@pytest.mark.parametrize("case", golden_cases("DDIMScheduler"), ids=key_of)
def test_golden(case):
    check_golden(ours.DDIMScheduler, case)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("eta", "clipped"), [(0.0, False), (0.6, True), (1.0, False)])
def test_every_option_as_diffusers(config, eta, clipped):
    if config["rescale_betas_zero_snr"]:
        eta = min(eta, 0.99)  # with η = 1 diffusers takes a root of 1 − ᾱ' − σ², which rounding may leave below 0
    kwargs = {"eta": eta, "use_clipped_model_output": clipped}
    compare_steps("DDIMScheduler", config, steps=9, step_kwargs=kwargs, tolerance=2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5])
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
        {"shape": (300, 3, 32, 32), "steps": 2},
        {"begin": 4},
    ],
    ids=str,
)
def test_dtypes_shapes_and_generators(options, eta):
    compare_steps("DDIMScheduler", step_kwargs={"eta": eta}, tolerance=2e-6, **options)


@pytest.mark.parametrize("t", [1, 3, 57, 998])
def test_timesteps_off_the_list(t):
    theirs, mine = pair("DDIMScheduler")
    x = torch.randn(2, 3, 4, 4)
    results = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        results.append(scheduler.step(x.sin(), t, x, variance_noise=x.cos(), eta=0.3))
    assert error(results[1].prev_sample.numpy(), results[0].prev_sample.numpy()) < 2e-6


def test_variance_noise_is_the_noise():
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    given = scheduler.step(x.sin(), 500, x, eta=1.0, variance_noise=noise)
    drawn = scheduler.step(x.sin(), 500, x, eta=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(given.prev_sample, drawn.prev_sample)


def test_full_noise_from_zero_snr():
    """From ᾱ = 0 with η = 1 the step is √ᾱ'·x0 + √(1−ᾱ')·z, whatever ε was."""
    scheduler = ours.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(10)
    x, z = (torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    step = scheduler.step(x.sin(), 999, x, eta=1.0, variance_noise=z)
    abar = scheduler._abar[899]
    expected = abar**0.5 * -x.sin() + (1 - abar) ** 0.5 * z
    torch.testing.assert_close(step.prev_sample, expected, rtol=0, atol=1e-7)


def test_get_variance():
    theirs, mine = pair("DDIMScheduler", {"set_alpha_to_one": False})
    for t, before in [(999, 979), (500, 499), (10, 0), (5, -15)]:
        expected = theirs._get_variance(t, before).double()
        torch.testing.assert_close(mine._get_variance(t, before).double(), expected, rtol=1e-6, atol=0)
        assert mine._get_variance(torch.tensor(t), torch.tensor(before)) == mine._get_variance(t, before)


def test_bad_input():
    x = torch.randn(2, 3, 8, 8)
    scheduler = ours.DDIMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 5, x)
    for steps in (0, -1, 1001, 2.5, None):
        with pytest.raises(ValueError, match=r"it must be an int in \[1, 1000\]"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(10)
    for t in (-1, 1000, 3.5, float("nan"), torch.tensor(3.5)):
        with pytest.raises(ValueError, match="timestep is"):
            scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        scheduler.step(x, 5, x, eta=1.5)
    with pytest.raises(ValueError, match="model_output"):
        scheduler.step(x[:, :2], 5, x)
    with pytest.raises(ValueError, match="'leading', 'linspace', 'trailing'"):
        ours.DDIMScheduler(timestep_spacing="even").set_timesteps(10)
    with pytest.raises(NotImplementedError, match="squaredcos_cap_v2"):
        ours.DDIMScheduler(beta_schedule="cosine")
    zero_snr = ours.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    zero_snr.set_timesteps(10)
    with pytest.raises(ValueError, match="'epsilon' needs a schedule that stays above 0"):
        zero_snr.step(x, 999, x)
