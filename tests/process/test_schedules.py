import inspect
import math

import numpy as np
import pytest

from diffkern.process import (
    SCHEDULES,
    cosine_betas,
    exp_betas,
    laplace_betas,
    linear_betas,
    make_betas,
    scaled_linear_betas,
    sigmoid_beta_betas,
    sigmoid_betas,
    zero_terminal_snr,
)
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


FUNCTIONS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "sigmoid_beta": sigmoid_beta_betas,
    "laplace": laplace_betas,
    "exp": exp_betas,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_name(name):
    function = FUNCTIONS[name]
    np.testing.assert_array_equal(make_betas(name, 50), function(50))
    options = [option for option in inspect.signature(function).parameters if option != "num_timesteps"]
    given = {
        option: {"start": -2.0, "end": 2.5, "tau": 0.7, "beta_start": 1e-3, "beta_end": 0.03}[option]
        for option in options
    }
    np.testing.assert_array_equal(make_betas(name, 50, **given), function(50, **given))
    np.testing.assert_array_equal(make_betas(name, 50, **dict.fromkeys(options)), function(50))
    with pytest.raises(ValueError, match=f"'{name}' takes no power; .*{', '.join(options) or 'no options'}"):
        make_betas(name, 50, power=2.0)


@pytest.mark.parametrize("case", ["c0", "c3", "c6", "c9"])
def test_lucidrains_sigmoid(case):
    betas = load("lucidrains_gaussian")[f"{case}/buffers/betas"]
    # Theirs takes sigmoid(±3) in float32, and near the end ᾱ is a difference from that.
    assert error(make_betas("sigmoid", len(betas)), betas) < 1e-5


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1.0), (0, 3, 0.3), (-1, 2, 2.0)])
def test_sigmoid_is_the_papers_alpha_bar(start, end, tau):
    def sigmoid(v):
        return 1 / (1 + np.exp(-v / tau))

    u = np.arange(1, 900) / 1000
    expected = (sigmoid(end) - sigmoid(start + u * (end - start))) / (sigmoid(end) - sigmoid(start))
    betas = sigmoid_betas(1000, start, end, tau)
    np.testing.assert_allclose(np.cumprod(1 - betas)[: len(u)], expected, rtol=1e-10)


def test_laplace_has_the_quantiles_of_its_distribution():
    """ᾱ⁴ at u where log r is the quantile: ᾱ² = r/(1+r)."""
    u = np.arange(1, 900) / 1000
    square = np.cumprod(1 - laplace_betas(1000))[: len(u)] ** 2
    start = 1 / (1 + 1e-6**0.5)  # r/(1+r) at u = 0
    square = square * start
    log_ratio = np.log(square / (1 - square))
    quantiles = -0.5 * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u))
    np.testing.assert_allclose(log_ratio, quantiles, atol=3e-3)
    assert (np.diff(log_ratio) < 0).all()


def test_exp_is_the_same_at_every_step():
    np.testing.assert_allclose(exp_betas(1000), 1 - math.exp(-0.012), rtol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("sigmoid_beta", "sigmoid"), ("laplace", "laplace"), ("cosine", "squaredcos_cap_v2"), ("exp", "exp")],
)
@pytest.mark.parametrize("num_timesteps", [20, 1000])
def test_diffusers_where_it_is_installed(ours, theirs, num_timesteps):
    peer = pytest.importorskip("diffusers").schedulers.scheduling_ddpm
    if ours == "exp":  # which no configuration of a scheduler names
        betas = peer.betas_for_alpha_bar(num_timesteps, alpha_transform_type="exp")
    else:
        betas = peer.DDPMScheduler(num_timesteps, beta_schedule=theirs).betas
    assert error(make_betas(ours, num_timesteps), betas.numpy()) < 1e-6


class TestZeroTerminalSnr:
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_the_last_alpha_bar_is_0_and_the_first_stays(self, name):
        before = make_betas(name, 1000)
        after = zero_terminal_snr(before)
        assert (after[0], after[-1]) == (before[0], 1.0)
        abar, changed = np.cumprod(1 - before), np.cumprod(1 - after)
        assert changed[-1] == 0
        root, new = np.sqrt(abar), np.sqrt(changed)
        np.testing.assert_allclose(new / root[0], (root - root[-1]) / (root[0] - root[-1]), atol=1e-12)

    @pytest.mark.parametrize("case", ["ddpm_zero_snr", "ddim_v_zero_snr"])
    def test_diffusers_tables(self, case):
        golden = load("diffusers_schedulers")
        betas = zero_terminal_snr(scaled_linear_betas(1000))
        assert error(np.cumprod(1 - betas), golden[f"{case}/alphas_cumprod"]) < 2e-5  # theirs is a float32 product

    def test_it_is_idempotent(self):
        once = zero_terminal_snr(linear_betas(1000))
        np.testing.assert_allclose(zero_terminal_snr(once), once, rtol=1e-9)

    def test_one_beta_is_refused(self):
        with pytest.raises(ValueError, match="needs at least 2"):
            zero_terminal_snr([0.1])
        with pytest.raises(ValueError, match=r"betas\[0\] is 1.5"):
            zero_terminal_snr([1.5, 0.1])


def test_errors_say_what_is_allowed():
    names = ", ".join(map(repr, SCHEDULES))
    with pytest.raises(ValueError, match=f"schedule is 'sqrt'; it may be one of {names}"):
        make_betas("sqrt", 10)
    with pytest.raises(ValueError, match="'cosine' takes no beta_end; it has no options"):
        make_betas("cosine", 10, beta_end=0.1)
    with pytest.raises(ValueError, match="'sigmoid' takes no beta_start; its options are start, end, tau"):
        make_betas("sigmoid", 10, beta_start=0.1)
    for name in SCHEDULES:
        with pytest.raises(ValueError, match="num_timesteps is 0"):
            make_betas(name, 0)
    with pytest.raises(ValueError, match=r"beta_start and beta_end are -0\.1"):
        scaled_linear_betas(10, beta_start=-0.1)
    for bad in ({"start": 3, "end": 3}, {"tau": 0}, {"tau": math.nan}, {"end": math.inf}):
        with pytest.raises(ValueError, match="start, end and tau are"):
            sigmoid_betas(10, **bad)
    with pytest.raises(ValueError, match=r"betas\[\d+\] is .*; every beta must be in"):
        sigmoid_beta_betas(10, 1e-4, 2.0)


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
