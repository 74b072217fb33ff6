"""Loss weights against the papers' formulas, lucidrains' tables, and the limits in which the formulas say 0/0."""

import numpy as np
import pytest

from diffkern.process import (
    WEIGHTINGS,
    GaussianProcess,
    cosine_betas,
    linear_betas,
    loss_weights,
    sigmoid_betas,
    zero_terminal_snr,
)
from tests.golden_data import load

PREDICTIONS = ("eps", "x0", "v", "x_prev", "flow")


def weights_on_x0(name, snr):
    """The formulas with their default options, as each paper prints them, carried to x0."""
    sigma = 1 / np.sqrt(snr)
    return {
        "min_snr": np.minimum(snr, 5),
        "soft_min_snr": 1 / (sigma**2 + 1 / 4),
        "p2": snr / (1 + snr),
        "edm": (sigma**2 + 0.25) / (sigma * 0.5) ** 2,
    }[name]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "p2", "edm"])
@pytest.mark.parametrize("betas", [linear_betas(100), cosine_betas(1000)], ids=["linear", "cosine"])
def test_one_error_of_x0_weighs_the_same_in_every_prediction(betas, name, prediction):
    """Measured, not derived: the error that a wrong output makes in x0, by the process's own conversion."""
    process = GaussianProcess(betas, prediction)
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    count = process.num_timesteps
    x_t, t = np.full((count, 1), 0.3), np.arange(count)
    x0, moved = (process.convert(x_t, np.full((count, 1), m), t, prediction, "x0") for m in (0.7, 1.7))
    expected = weights_on_x0(name, snr) * (moved - x0)[:, 0] ** 2
    np.testing.assert_allclose(loss_weights(process, name), expected, rtol=1e-6)


def test_options_are_those_of_the_formulas():
    process = GaussianProcess(linear_betas(100))
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    for name, options, expected in [
        ("min_snr", {"gamma": 2.0}, np.minimum(snr, 2) / snr),
        ("soft_min_snr", {"gamma": 2.0}, 2 / (snr + 2)),
        ("p2", {"k": 3.0, "gamma": 0.5}, 1 / np.sqrt(3 + snr)),
        ("p2", {"gamma": 0.0}, np.ones(100)),
        ("edm", {"sigma_data": 2.0}, (1 / snr + 4) / 4),
    ]:
        np.testing.assert_allclose(loss_weights(process, name, **options), expected, rtol=1e-12)


@pytest.mark.parametrize("case", range(10))
def test_min_snr_is_lucidrains(case):
    """Its tables are float32. Without min-SNR it weighs by SNR alone, which is a gamma beyond all of them."""
    golden = load("lucidrains_gaussian")
    meta = golden.meta["cases"][case]
    assert meta["key"] == f"c{case}"
    betas = {"sigmoid": sigmoid_betas, "cosine": cosine_betas, "linear": linear_betas}[meta["beta_schedule"]]
    process = GaussianProcess(betas(meta["timesteps"]), meta["objective"].replace("pred_", "").replace("noise", "eps"))
    gamma = 5.0 if meta["min_snr_loss_weight"] else 1e30
    expected = golden[f"c{case}/buffers/loss_weight"]
    # Its sigmoid takes the ends of ᾱ's curve from float32, which moves ᾱ by some 1e-8 at every step.
    np.testing.assert_allclose(loss_weights(process, "min_snr", gamma=gamma), expected, rtol=1e-6, atol=2e-8)


def laplace_density(lam, loc, scale):
    return np.exp(-np.abs(lam - loc) / scale) / (2 * scale)


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 0.5), (1.0, 2.0)])
def test_laplace_is_the_ratio_of_the_densities(loc, scale):
    """The cosine schedule in closed form: SNR = cot²(φ), φ linear in t, so dλ/dt = −4·φ'/sin(2φ)."""
    count = 4000
    process = GaussianProcess(cosine_betas(count))
    weights = loss_weights(process, "laplace", loc=loc, scale=scale)
    slope = np.pi / 2 / 1.008 / count
    angle = ((np.arange(1, count + 1) / count + 0.008) / 1.008) * np.pi / 2
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    abar = np.cos(angle) ** 2 / start  # the process begins at ᾱ = 1
    lam = np.log(abar / (1 - abar))
    steepness = 2 * slope * np.tan(angle) / (1 - abar)
    expected = laplace_density(lam, loc, scale) * steepness * count
    # The density bends at loc, the last beta is capped and λ's first steps are wide: there the two need not agree.
    inside = (np.abs(lam - loc) > 0.05) & (np.arange(count) < count - 50) & (np.arange(count) > 50)
    np.testing.assert_allclose(weights[inside], expected[inside], rtol=2e-3)
    assert inside.mean() > 0.9


@pytest.mark.parametrize("betas", [linear_betas(100), cosine_betas(1000), zero_terminal_snr(linear_betas(1000))])
def test_laplace_has_a_mean_of_one(betas):
    weights = loss_weights(GaussianProcess(betas), "laplace")
    assert weights.mean() == pytest.approx(1, abs=1e-4)
    assert (weights >= 0).all()
    assert weights[0] > 0  # e^−18 and less, where 1 − e^−18 would have lost it


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "x_prev"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_zero_terminal_snr_is_the_limit(name, prediction):
    """A last ᾱ of 0 gives what the same steps with a last ᾱ of nearly 0 give."""
    betas = zero_terminal_snr(linear_betas(1000))
    near = np.append(betas[:-1], 1 - 1e-9)
    process = GaussianProcess(betas, prediction)
    if (name, prediction) == ("edm", "eps"):
        with pytest.raises(ValueError, match=r"'edm' of the prediction 'eps' is infinite at t = 999, where SNR is 0"):
            loss_weights(process, name)
        return
    weights, limit = loss_weights(process, name), loss_weights(GaussianProcess(near, prediction), name)
    if name == "laplace":  # λ leaves no room for a step of its own beyond the last one but one
        assert weights[-1] == 0
        weights, limit = weights[:-2], limit[:-2]
    np.testing.assert_allclose(weights, limit, rtol=1e-6, atol=1e-8)
    if (name, prediction) in (("min_snr", "eps"), ("soft_min_snr", "eps"), ("p2", "eps")):
        assert weights[-1] == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("min-snr", {}, "weighting is 'min-snr'; it may be one of 'min_snr', 'soft_min_snr', 'p2', 'edm', 'laplace'"),
        ("p2", {"sigma_data": 1.0}, "sigma_data is 1.0; the weighting 'p2' takes k, gamma"),
        ("min_snr", {"gamma": 0.0}, "gamma of the weighting 'min_snr' is 0.0; it must be positive and finite"),
        ("p2", {"gamma": -1.0}, "gamma of the weighting 'p2' is -1.0; it must be 0 or more"),
        ("laplace", {"scale": float("nan")}, "scale of the weighting 'laplace' is nan; it must be positive"),
        ("laplace", {"loc": float("inf")}, "loc of the weighting 'laplace' is inf; it must be finite"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(GaussianProcess(linear_betas(100)), name, **options)


def test_laplace_needs_neighbours():
    with pytest.raises(ValueError, match="'laplace' needs a process of 2 or more steps"):
        loss_weights(GaussianProcess([0.5]), "laplace")
