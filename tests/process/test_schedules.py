import numpy as np
import pytest

from diffkern.process import cosine_betas, linear_betas, make_betas, scaled_linear_betas
from diffkern.process.schedules import check_betas
from tests.golden_data import error, load


def test_linear_scales_with_the_number_of_steps():
    betas = linear_betas(1000)
    assert (betas[0], betas[-1]) == (1e-4, 0.02)
    np.testing.assert_allclose(linear_betas(100)[[0, -1]], [1e-3, 0.2], rtol=1e-15)
    np.testing.assert_allclose(linear_betas(1000, 1e-4, 0.2)[[0, -1]], [1e-4, 0.2], rtol=1e-15)


def test_linear_with_a_last_beta_above_one_is_refused():
    assert linear_betas(20)[-1] == 1.0
    with pytest.raises(ValueError, match=r"betas\[\d+\] is .*; every beta must be in"):
        linear_betas(10)


def test_scaled_linear_is_linear_in_the_square_root():
    roots = np.sqrt(scaled_linear_betas(1000))
    np.testing.assert_allclose(np.diff(roots), (0.012**0.5 - 0.00085**0.5) / 999, rtol=1e-9)


def test_cosine_is_the_formula_up_to_its_cap():
    def alpha_bar(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    betas = cosine_betas(1000)
    assert betas[-1] == 0.999
    u = np.arange(1, 1000) / 1000
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], alpha_bar(u) / alpha_bar(0), rtol=1e-10)


@pytest.mark.parametrize("case", ["ddpm_small", "ddpm_learned_range", "ddpm_v_linspace"])
def test_diffusers_betas(case):
    golden = load("diffusers_schedulers")
    betas = golden[f"{case}/betas"]
    config = next(c["config"] for c in golden.meta["cases"] if c["key"] == case)
    name = {"squaredcos_cap_v2": "cosine"}.get(config["beta_schedule"], config["beta_schedule"])
    ours = make_betas(name, 1000, beta_start=config.get("beta_start"), beta_end=config.get("beta_end"))
    assert error(ours, betas) < 2e-7  # theirs is float32


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_by_name(name):
    function = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas}[name]
    np.testing.assert_array_equal(make_betas(name, 50), function(50))


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"schedule is 'sqrt'.*'linear', 'scaled_linear', 'cosine'"):
        make_betas("sqrt", 10)
    with pytest.raises(ValueError, match="'cosine' takes neither"):
        make_betas("cosine", 10, beta_end=0.1)
    with pytest.raises(ValueError, match="num_timesteps is 0"):
        make_betas("linear", 0)
    with pytest.raises(ValueError, match=r"beta_start and beta_end are -0\.1"):
        scaled_linear_betas(10, beta_start=-0.1)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, np.nan, np.inf, 2.0**-54])
def test_a_bad_beta_is_named(bad):
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        check_betas([0.1, bad, 0.2])


@pytest.mark.parametrize("shape", [(), (0,), (2, 2)])
def test_betas_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="must be 1-D"):
        check_betas(np.full(shape, 0.1))


def test_betas_are_copied():
    given = np.array([0.1, 0.2])
    check_betas(given)[0] = 0.5
    assert given[0] == 0.1
