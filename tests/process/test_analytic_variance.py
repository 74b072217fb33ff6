"""The reverse variance of Analytic-DPM, against the paper's formula and against a problem that is solved exactly."""

import numpy as np
import pytest

from diffkern.process import GaussianProcess, cosine_betas, linear_betas
from diffkern.process.likelihood import prior_bits_per_dim


def analytic(betas, mean_squares, **kwargs):
    return GaussianProcess(betas, variance="analytic", eps_mean_square=mean_squares, **kwargs)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(40), linear_betas(1000, 1e-4, 0.2)])
def test_it_is_the_formula_of_the_paper(betas):
    """σ*² = λ² + (√(β̄_n/α_n) − √(β̄_{n−1} − λ²))²·(1 − β̄_n·E‖score‖²/d), λ² = β̃, score = −ε̂/√β̄ (their theorem 1)."""
    mean_squares = np.random.default_rng(0).uniform(0, 1, len(betas))
    process = analytic(betas, mean_squares)
    alpha, noise, noise_prev = 1 - betas, 1 - process.alphas_cumprod, 1 - process.alphas_cumprod_prev
    score_mean_square = mean_squares / noise
    small = process.posterior_variance
    excess = (np.sqrt(noise / alpha) - np.sqrt(noise_prev - small)) ** 2 * (1 - noise * score_mean_square)
    np.testing.assert_allclose(process.model_variance[1:], (small + excess)[1:], rtol=1e-9)
    assert process.model_variance[0] == pytest.approx(max(excess[0], small[1]), rel=1e-9)
    np.testing.assert_array_equal(process.model_log_variance, np.log(process.model_variance))
    # The same excess in terms of the posterior's mean, where ᾱ has not underflowed.
    in_x0 = process.posterior_mean_coef1**2 * (1 / process.alphas_cumprod - 1) * (1 - mean_squares)
    np.testing.assert_allclose(excess[1:], in_x0[1:], rtol=1e-6)


def test_mean_squares_beyond_the_bounds_give_the_bounds():
    betas = cosine_betas(30)
    none, all_of_it = analytic(betas, np.full(30, 1.2)), analytic(betas, np.zeros(30))
    np.testing.assert_array_equal(none.model_variance[1:], none.posterior_variance[1:])
    assert none.model_variance[0] == pytest.approx(none.posterior_variance[1])
    largest = all_of_it.posterior_variance + betas**2 / ((1 - betas) * (1 - all_of_it.alphas_cumprod))
    np.testing.assert_allclose(all_of_it.model_variance[1:], largest[1:])
    assert none.channel_variance == "fixed"


class Mixture:
    """x0 is one of a few numbers: all that is known of it at x_t is known exactly."""

    values, weights = np.array([-0.8, 0.1, 0.7]), np.array([0.5, 0.3, 0.2])

    def at(self, process, t, points=4001):
        """x_t on a grid, the weights of an integral over q(x_t), and mean and variance of x0 given x_t."""
        s, sigma = process.sqrt_alphas_cumprod[t], process.sqrt_one_minus_alphas_cumprod[t]
        # Around each centre, as wide as the noise is.
        x = (s * self.values[:, None] + sigma * np.linspace(-9, 9, points)).ravel()
        step = 18 * sigma / (points - 1)
        own = np.exp(-0.5 * ((x - s * np.repeat(self.values, points)) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        joint = self.weights[:, None] * np.exp(-0.5 * ((x - s * self.values[:, None]) / sigma) ** 2)
        given = joint / joint.sum(axis=0)
        mean = self.values @ given
        return x, np.repeat(self.weights, points) * own * step, mean, self.values**2 @ given - mean**2


def test_it_is_the_mean_variance_of_the_reverse_step_and_so_the_best_one():
    """Its bound is lower than with any other variance, and E[Var(x_{t−1} | x_t)] = β̃ + coef1²·E[Var(x0 | x_t)]."""
    mixture = Mixture()
    process = GaussianProcess(linear_betas(1000)).respace(20)
    mean_squares, exact = np.empty(20), np.empty(20)
    for t in range(20):
        x, weight, mean, variance = mixture.at(process, t)
        assert weight.sum() == pytest.approx(1, abs=1e-9)
        eps = (x - process.sqrt_alphas_cumprod[t] * mean) / process.sqrt_one_minus_alphas_cumprod[t]
        mean_squares[t] = weight @ eps**2
        exact[t] = process.posterior_variance[t] + process.posterior_mean_coef1[t] ** 2 * (weight @ variance)
    best = analytic(process.betas, mean_squares)
    np.testing.assert_allclose(best.model_variance[1:], exact[1:], rtol=1e-7)
    assert (best.model_variance[5:15] > 1.1 * process.posterior_variance[5:15]).any()

    def expected_kl(log_variance):
        # E KL, up to what does not depend on it: the mean square about the mean is E[Var(x_{t−1} | x_t)].
        return 0.5 * (log_variance + exact * np.exp(-log_variance))[1:]

    least = expected_kl(best.model_log_variance)
    for variance in ("fixed_small", "fixed_large"):
        other = GaussianProcess(process.betas, variance=variance)
        assert (expected_kl(other.model_log_variance) > least).all()
    for factor in (0.999, 1.001):
        assert (expected_kl(best.model_log_variance + np.log(factor)) > least).all()


def test_respacing_keeps_the_estimate_of_each_noise_level():
    mean_squares = np.linspace(0.2, 0.99, 1000)
    short = analytic(linear_betas(1000), mean_squares).respace(10)
    np.testing.assert_array_equal(short.eps_mean_square, mean_squares[short.timestep_map])
    assert short.variance == "analytic"
    np.testing.assert_array_equal(short.model_variance, analytic(short.betas, short.eps_mean_square).model_variance)
    assert short.tables().variance == "fixed"
    np.testing.assert_array_equal(short.tables().log_variance, short.model_log_variance)
    with pytest.raises(ValueError, match="read-only"):
        short.eps_mean_square[0] = 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variance": "analytic"}, "eps_mean_square is not given and variance is 'analytic'"),
        ({"eps_mean_square": [1, 1, 1]}, "eps_mean_square is given and variance is 'fixed_small'"),
        ({"variance": "analytic", "eps_mean_square": [1, 1]}, r"shape \(2,\); it must hold 3 finite numbers"),
        ({"variance": "analytic", "eps_mean_square": [1, np.nan, 1]}, "finite numbers"),
        ({"variance": "analytic", "eps_mean_square": [1, -0.1, 1]}, "0 or more"),
        ({"variance": "analytic", "eps_mean_square": [1, 1, 1], "betas": [0.1, 0.2, 1.0]}, "betas reach 1"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcess(**{"betas": [0.1, 0.2, 0.3], **kwargs})


@pytest.mark.parametrize("alphas_cumprod", [0.0, 1e-12, 4e-5, 0.3, 0.999])
def test_the_prior_term_is_the_divergence_of_two_gaussians(alphas_cumprod):
    """Against the integral of q·log2(q/p), and exact where ᾱ_T is tiny."""
    x0 = np.array([[0.0, 0.5, -1.0], [1.0, 1.0, 1.0]])
    found = prior_bits_per_dim((x0**2).mean(axis=1), alphas_cumprod)
    mean, deviation = np.sqrt(alphas_cumprod) * x0, np.sqrt(1 - alphas_cumprod)
    z = np.linspace(-12, 12, 20001)
    x = mean[..., None] + deviation * z
    weight = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    divergence = (weight * (-0.5 * z**2 - np.log(deviation) + 0.5 * x**2)).sum(axis=-1) / np.log(2)
    np.testing.assert_allclose(found, divergence.mean(axis=1), atol=1e-12)
    assert found.dtype == np.float64
    if alphas_cumprod == 1e-12:
        # ½·(ᾱ·m + ᾱ²/2): the divergence's own size, which 1 − 1 − log 1 would lose.
        np.testing.assert_allclose(found, 0.5e-12 * (x0**2).mean(axis=1) / np.log(2), rtol=1e-9)


def test_errors_of_the_prior_term():
    with pytest.raises(ValueError, match=r"alphas_cumprod is 1\.0"):
        prior_bits_per_dim([0.1], 1.0)
    for bad in (-0.1, np.nan):
        with pytest.raises(ValueError, match="x0_mean_square"):
            prior_bits_per_dim([bad], 0.5)
