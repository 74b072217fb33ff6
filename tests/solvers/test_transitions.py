"""Transitions: what a prediction means at any level and scale, and which levels the rows lead between."""

import numpy as np
import pytest

from diffkern.process import GaussianProcess, cosine_betas
from diffkern.process.gaussian import PREDICTIONS
from diffkern.solvers import chain, single_steps, transitions
from diffkern.solvers.prediction import LEVEL_PREDICTIONS

# Variance-preserving, exploding, flow matching, and something in between.
LEVELS = {
    "vp": (np.array([0.1, 0.8, 1.0]), np.sqrt(1 - np.array([0.1, 0.8, 1.0]) ** 2)),
    "ve": (np.ones(3), np.array([80.0, 1.5, 0.0])),
    "flow": (np.array([0.05, 0.5, 1.0]), np.array([0.95, 0.5, 0.0])),
    "any": (np.array([0.3, 2.0, 4.0]), np.array([5.0, 0.7, 0.1])),
}


@pytest.mark.parametrize("prediction", LEVEL_PREDICTIONS)
@pytest.mark.parametrize("levels", LEVELS)
def test_predictions_mean_the_image_and_the_noise(levels, prediction):
    alpha, sigma = LEVELS[levels]
    steps = chain(alpha, sigma, [9.5, 3.0], prediction)
    np.testing.assert_array_equal(steps.alpha_next, alpha[1:])
    np.testing.assert_array_equal(steps.sigma_next, sigma[1:])
    assert steps.times.tolist() == [9.5, 3.0]
    x0, eps = np.random.default_rng(0).standard_normal((2, 2, 7))
    a, s = steps.alpha[:, None], steps.sigma[:, None]
    k = np.hypot(a, s)
    x = a * x0 + s * eps
    # v is Salimans & Ho's where the state has unit variance: of x/k, whose levels are α/k and σ/k.
    m = {"eps": eps, "x0": x0, "v": a / k * eps - s / k * x0, "flow": eps - x0}[prediction]
    np.testing.assert_allclose(steps.a_x[:, None] * x + steps.a_m[:, None] * m, x0, atol=1e-12)
    np.testing.assert_allclose(steps.e_x[:, None] * x + steps.e_m[:, None] * m, eps, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_process_leads_from_its_last_step_to_the_image(prediction):
    process = GaussianProcess(cosine_betas(100), prediction).respace(7)
    steps = transitions(process)
    assert transitions(steps) is steps
    np.testing.assert_array_equal(steps.times, process.timestep_map[::-1])
    np.testing.assert_allclose(steps.alpha**2 + steps.sigma**2, 1)
    np.testing.assert_array_equal(steps.alpha[1:], steps.alpha_next[:-1])
    assert (steps.alpha_next[-1], steps.sigma_next[-1]) == (1, 0)
    assert steps.log_snr_next[-1] == np.inf
    np.testing.assert_allclose(steps.log_snr, np.log(process.alphas_cumprod / (1 - process.alphas_cumprod))[::-1] / 2)
    for row, t in enumerate(range(6, -1, -1)):
        x_t, output = np.random.default_rng(row).standard_normal((2, 1, 5))
        x0 = process.convert(x_t, output, [t], prediction, "x0")
        eps = process.convert(x_t, output, [t], prediction, "eps")
        np.testing.assert_allclose(steps.a_x[row] * x_t + steps.a_m[row] * output, x0, rtol=1e-9)
        np.testing.assert_allclose(steps.e_x[row] * x_t + steps.e_m[row] * output, eps, rtol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match=r"alpha\[1\] is 0.0: x0 cannot be recovered"):
        single_steps([0.5, 0.0], [0.8, 1.0], [0.6, 0.1], [0.7, 0.9], [1, 2], "eps")
    with pytest.raises(ValueError, match="prediction is 'x_prev'; it may be one of 'eps', 'x0', 'v', 'flow'"):
        chain([0.5, 1.0], [0.8, 0.0], [1], "x_prev")
    for prediction in ("x0", "v", "flow"):
        assert np.isfinite(single_steps([0.0], [1.0], [0.1], [0.9], [1], prediction).a_x).all()
