import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffkern.process import GaussianProcess, cosine_betas, linear_betas, make_betas
from diffkern.process.gaussian import PREDICTIONS
from tests.golden_data import error, load

GOLDEN = load("guided_gaussian")
KEYS = [proc["key"] for proc in GOLDEN.meta["procs"]]


def golden_process(key, **kwargs):
    proc = next(proc for proc in GOLDEN.meta["procs"] if proc["key"] == key)
    process = GaussianProcess(make_betas(proc["schedule"], proc["T"]), **kwargs)
    return process.respace(proc["respacing"]) if proc["respacing"] else process


@pytest.mark.parametrize("key", KEYS)
def test_openai_tables(key):
    process = golden_process(key)
    assert GOLDEN[f"{key}/tables/timestep_map"].tolist() == process.timestep_map.tolist()
    for name in (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
    ):
        table = getattr(process, name)
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, GOLDEN[f"{key}/tables/{name}"], rtol=1e-11, atol=0, err_msg=name)


@pytest.mark.parametrize("key", KEYS)
def test_openai_marginal_posterior_and_conversions(key):
    process = golden_process(key)
    t = GOLDEN[f"{key}/t"]
    x0, x_t, eps = (GOLDEN[f"inputs/{name}"].astype(np.float64) for name in ("x0", "x_t", "noise"))
    mean, variance, log_variance = process.q_mean_variance(x0, t)
    for name, value in (("mean", mean), ("variance", variance), ("log_variance", log_variance)):
        assert error(np.broadcast_to(value, x0.shape), GOLDEN[f"{key}/q_{name}"]) < 1e-6
    assert error(mean + np.sqrt(variance) * eps, GOLDEN[f"{key}/q_sample"]) < 1e-6
    for name, value in zip(
        ("mean", "variance", "log_variance"), process.q_posterior_mean_variance(x0, x_t, t), strict=True
    ):
        assert error(np.broadcast_to(value, x0.shape), GOLDEN[f"{key}/q_post_{name}"]) < 1e-6
    assert error(process.convert(x_t, eps, t, "eps", "x0"), GOLDEN[f"{key}/predict_xstart_from_eps"]) < 1e-6
    assert error(process.convert(x_t, x0, t, "x0", "eps"), GOLDEN[f"{key}/predict_eps_from_xstart"]) < 1e-6


def test_posterior_is_bayes_rule():
    """q(x_{t−1} | x_t, x0) from the product of the two Gaussians it comes from, in their precisions."""
    process = GaussianProcess(linear_betas(1000))
    t = np.arange(1, 1000)
    alpha, beta, prev = 1 - process.betas[t], process.betas[t], process.alphas_cumprod[t - 1]
    precision = alpha / beta + 1 / (1 - prev)
    np.testing.assert_allclose(process.posterior_variance[t], 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(process.posterior_mean_coef1[t], np.sqrt(prev) / (1 - prev) / precision, rtol=1e-9)
    np.testing.assert_allclose(process.posterior_mean_coef2[t], np.sqrt(alpha) / beta / precision, rtol=1e-9)


def test_first_step_of_the_variances():
    betas = linear_betas(100)
    small, large = GaussianProcess(betas), GaussianProcess(betas, variance="fixed_large")
    assert small.posterior_variance[0] == 0
    assert small.posterior_log_variance_clipped[0] == np.log(small.posterior_variance[1])
    assert small.model_variance is small.posterior_variance
    np.testing.assert_array_equal(large.model_variance, [large.posterior_variance[1], *betas[1:]])
    np.testing.assert_array_equal(large.model_log_variance, np.log(large.model_variance))
    assert GaussianProcess(betas, variance="learned_range").model_variance is None


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, repeat=2)))
@given(st.integers(0, 2**32 - 1))
def test_conversions_agree_with_the_definitions(source, target, seed):
    process = GaussianProcess(cosine_betas(1000))
    rng = np.random.default_rng(seed)
    x0, eps = rng.standard_normal((2, 4, 5))
    t = rng.integers(0, 900, 4)
    s, sigma = process.sqrt_alphas_cumprod[t, None], process.sqrt_one_minus_alphas_cumprod[t, None]
    x_t = s * x0 + sigma * eps
    x_prev = process.q_posterior_mean_variance(x0, x_t, t)[0]
    of = {"x0": x0, "eps": eps, "v": s * eps - sigma * x0, "x_prev": x_prev, "flow": eps - x0}
    converted = process.convert(x_t, of[source], t, source, target)
    np.testing.assert_allclose(converted, of[target], atol=1e-11)
    np.testing.assert_allclose(process.convert(x_t, converted, t, target, source), of[source], atol=1e-10)


def test_beta_of_0_2_over_1000_steps_underflows_nowhere():
    process = GaussianProcess(linear_betas(1000, 1e-4, 0.2))
    assert 0 < process.alphas_cumprod[-1] < 1e-46
    assert np.float32(process.alphas_cumprod[-1]) == 0  # what float32 tables would divide by
    for name, table in vars(process).items():
        if isinstance(table, np.ndarray):
            assert np.isfinite(table).all(), name
    for source, target in itertools.product(["eps", "x0", "v"], repeat=2):
        assert np.isfinite(process.conversion(source, target)).all()
    respaced = process.respace(10)
    np.testing.assert_allclose(respaced.alphas_cumprod, process.alphas_cumprod[respaced.timestep_map], rtol=1e-6)


def test_alphas_cumprod_of_zero():
    """A last β of 1 (zero terminal SNR) and a product that underflows even in float64: no NaN, no warning."""
    process = GaussianProcess([0.1, 0.5, 1.0])
    assert process.alphas_cumprod[-1] == 0
    assert process.posterior_variance[-1] == 0.55
    np.testing.assert_array_equal(process.conversion("eps", "x0")[0][-1], np.inf)
    np.testing.assert_array_equal([table[-1] for table in process.conversion("v", "x0")], [0, -1])
    underflowed = GaussianProcess(np.full(1000, 0.9)).respace(50)
    for table in (underflowed.betas, underflowed.posterior_mean_coef1, underflowed.posterior_mean_coef2):
        assert np.isfinite(table).all()


def test_one_step():
    process = GaussianProcess([0.3], variance="fixed_large")
    assert process.posterior_log_variance_clipped.tolist() == [np.log(0.3)]
    assert process.model_variance.tolist() == [0.3]


def test_respacing_keeps_the_marginal_and_composes():
    process = GaussianProcess(cosine_betas(1000), "v", "learned_range")
    short = process.respace("10,15,20")
    np.testing.assert_allclose(short.alphas_cumprod, process.alphas_cumprod[short.timestep_map], rtol=1e-9)
    assert (short.prediction, short.variance, short.num_timesteps) == ("v", "learned_range", 45)
    shorter = short.keep([0, 7, 44])
    assert shorter.timestep_map.tolist() == short.timestep_map[[0, 7, 44]].tolist()
    assert process.respace(None) is process.respace(1000) is process
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps is"):
            process.respace(steps)


@pytest.mark.parametrize("bad", [[], [3, 3], [2, 1], [-1, 2], [0, 10], [0.0, 1.0], [[0, 1]]])
def test_keep_refuses(bad):
    with pytest.raises(ValueError, match="timesteps"):
        GaussianProcess(linear_betas(100)).keep([0, 10]).keep(bad)


def test_a_fractional_timestep_map_stays_float64_and_integers_int64():
    times = [0.25, 1.5, 20.125]
    process = GaussianProcess([0.1, 0.2, 0.3], timestep_map=times)
    assert process.timestep_map.dtype == np.float64
    assert process.keep([0, 2]).timestep_map.tolist() == [0.25, 20.125]
    assert GaussianProcess([0.1, 0.2, 0.3], timestep_map=np.float32(times)).timestep_map.dtype == np.float64
    assert GaussianProcess([0.1, 0.2, 0.3], timestep_map=np.uint8([3, 4, 5])).timestep_map.dtype == np.int64


def test_tables_are_float64_tensors_and_read_only_arrays():
    process = GaussianProcess(linear_betas(100))
    tables = process.tables("cpu")._asdict()
    assert tables.pop("variance") == "fixed"
    np.testing.assert_array_equal(tables.pop("log_betas"), np.log(process.betas))
    np.testing.assert_array_equal(tables.pop("log_variance"), process.model_log_variance)
    for name, table in tables.items():
        assert table.dtype == torch.float64
        before = getattr(process, name).copy()
        np.testing.assert_array_equal(table.numpy(), before)
        table.zero_()
        np.testing.assert_array_equal(getattr(process, name), before)
        with pytest.raises(ValueError, match="read-only"):
            getattr(process, name)[0] = 0


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_tables_of_a_learned_variance(variance):
    tables = GaussianProcess(linear_betas(100), variance=variance).tables()
    assert tables.variance == variance
    assert tables.log_variance is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prediction": "xprev"}, "prediction is 'xprev'; it may be one of 'eps', 'x0', 'v', 'x_prev', 'flow'"),
        ({"variance": "fixed"}, "variance is 'fixed'; it may be one of 'fixed_small', 'fixed_large', 'analytic', "),
        ({"timestep_map": [0, 1]}, "timestep_map is int64 of shape"),
        ({"timestep_map": [0.0, np.nan, 1.0]}, "timestep_map is float64 of shape .*; it must hold 3 finite numbers"),
        ({"timestep_map": [False, True, True]}, "timestep_map is bool"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcess([0.1, 0.2, 0.3], **kwargs)


@pytest.mark.parametrize("t", [[0, 3], [-1, 0], [0.0, 1.0], [0], 0])
def test_t_out_of_range_or_of_the_wrong_kind(t):
    process = GaussianProcess([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="t "):
        process.q_mean_variance(np.zeros((2, 3)), t)


def test_an_empty_batch():
    process = GaussianProcess([0.1, 0.2, 0.3])
    mean, _, _ = process.q_mean_variance(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))
    assert mean.shape == (0, 3)
