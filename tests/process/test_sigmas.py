"""Spacings of noise levels, from their definitions, and the timesteps that belong to levels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffkern.process import SIGMA_SPACINGS, GaussianProcess, linear_betas, space_sigmas, timesteps_of_sigmas

EVEN = {
    "linear": lambda sigmas: sigmas,
    "karras": lambda sigmas: sigmas ** (1 / 7),
    "exponential": np.log,
    "lu": lambda sigmas: -np.log(sigmas),
    "polyexponential": np.log,
    "beta": lambda sigmas: stats.beta.cdf((sigmas - 0.02) / (9.0 - 0.02), 0.6, 0.6),
}


@pytest.mark.parametrize("name", SIGMA_SPACINGS)
def test_each_is_even_in_its_own_measure(name):
    sigmas = space_sigmas(name, 12, 0.02, 9.0)
    assert sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas[[0, -1]], [9.0, 0.02])
    assert (np.diff(sigmas) < 0).all()
    steps = np.diff(EVEN[name](sigmas))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)
    np.testing.assert_allclose(space_sigmas(name, 1, 0.02, 9.0), [9.0])


def test_options():
    np.testing.assert_allclose(np.diff(space_sigmas("karras", 5, 1.0, 81.0, rho=4.0) ** 0.25), -0.5)
    logs = np.log(space_sigmas("polyexponential", 5, 1.0, np.e, rho=2.0))
    np.testing.assert_allclose(logs, np.linspace(1, 0, 5) ** 2, atol=1e-15)
    flat = space_sigmas("beta", 5, 0.0, 4.0, alpha=1.0, beta=1.0)
    np.testing.assert_allclose(flat, [4, 3, 2, 1, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 5, 0.1, 1.0), "spacing is 'cosine'; it may be one of 'linear', 'karras'"),
        (("karras", 0, 0.1, 1.0), "n is 0"),
        (("karras", 5, 2.0, 1.0), "sigma_min and sigma_max are 2.0 and 1.0"),
        (("exponential", 5, 0.0, 1.0), "sigma_min and sigma_max are 0.0"),
        (("linear", 5, 0.1, np.inf), "sigma_min and sigma_max are 0.1 and inf"),
        (("linear", 5, np.nan, 1.0), "sigma_min and sigma_max are nan"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        space_sigmas(*arguments)


@given(st.lists(st.floats(0, 999), min_size=1, max_size=20))
def test_timesteps_of_sigmas_inverts_the_table(times):
    abar = GaussianProcess(linear_betas(1000)).alphas_cumprod
    table = np.sqrt((1 - abar) / abar)
    between = np.exp(np.interp(times, np.arange(1000), np.log(table)))
    np.testing.assert_allclose(timesteps_of_sigmas(between, table), times, atol=1e-7)


def test_levels_outside_the_table_belong_to_its_ends():
    assert timesteps_of_sigmas([0.0, 0.01, 5.0, 9.0], [0.1, 1.0, 5.0]).tolist() == [0, 0, 2, 2]
