"""Euler's method, ancestral and with churn, against the papers' loops and k-diffusion's numbers."""

import functools
import itertools

import numpy as np
import pytest

from diffkern.process import GaussianProcess, cosine_betas, linear_betas, scaled_linear_betas
from diffkern.solvers import Churn, chain, ddim, euler, euler_ancestral, single_steps
from tests.golden_data import error, load
from tests.solvers.levels import LINEAR_LEVELS, SCALES, data, exploding_chain, k_diffusion, run, scaled
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.01, w=0.8)
GOLDEN = load("k_diffusion")


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_euler_is_ddim_without_noise(prediction, clip):
    process = GaussianProcess(cosine_betas(1000), prediction).respace(12)
    one, other = euler(process, clip=clip), ddim(process, clip=clip)
    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-12, atol=1e-14)
    assert one.times.tolist() == other.times.tolist()
    assert one.calls_network.all()


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ancestral_is_ddim_with_the_same_eta(eta, clip):
    process = GaussianProcess(linear_betas(1000), "v").respace(12)
    one, other = euler_ancestral(process, clip=clip, eta=eta), ddim(process, clip=clip, eta=eta)
    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_scale_of_x_goes_the_same_way(prediction, scale, clip):
    """y = x/α follows dy/dσ̂ = (y − x0)/σ̂, and noise comes to it, as the papers' loops say."""
    alpha, sigma = scaled(scale, LINEAR_LEVELS)
    levels = LINEAR_LEVELS
    steps = chain(alpha, sigma, np.arange(len(levels) - 1), prediction)
    y, noise = data(levels)
    network, x0_of = scaled_network(prediction, scale, clip)
    for solver in ("euler", "ancestral"):
        expected = [y]
        for i, (now, then) in enumerate(itertools.pairwise(levels)):
            y_now = expected[-1]
            derivative = (y_now - x0_of(y_now, now, i)) / now
            if solver == "euler":
                expected.append(y_now + derivative * (then - now))
            else:
                up = np.sqrt(then**2 * (now**2 - then**2) / now**2)
                down = np.sqrt(then**2 - up**2)
                expected.append(y_now + derivative * (down - now) + 1.02 * up * noise[i])
        if solver == "euler":
            program = euler(steps, clip=clip)
        else:
            program = euler_ancestral(steps, clip=clip, s_noise=1.02)
        states = run(program, network, y * alpha[0], noise)
        for row, state in enumerate(states):
            assert error(state / alpha[row + 1], expected[row + 1]) < 1e-11, (solver, row)


def scaled_network(prediction, scale, clip):
    """The stand-in network as it is called, network(x, row), and x0 of the state y, x0_of(y, σ̂, row)."""
    alphas, sigmas = scaled(scale, LINEAR_LEVELS)

    def network(x, t):
        return NETWORK(x, np.full(len(x), t))

    def x0_of(y, level, row):
        a, s = alphas[row], sigmas[row]
        output = network(a * y, float(row))
        if prediction == "eps":
            x0 = y - level * output
        elif prediction == "x0":
            x0 = output
        else:
            x0 = y / (1 + level**2) - output * level / np.sqrt(1 + level**2)
            assert s == pytest.approx(a * level)
        return x0 if clip is None else np.clip(x0, *clip)

    return network, x0_of


@pytest.mark.parametrize("case", ["euler", "euler_ancestral"])
def test_k_diffusion(case):
    network, x, sigmas = k_diffusion(GOLDEN, case)
    steps = exploding_chain(sigmas)
    program = euler(steps, clip=None) if case == "euler" else euler_ancestral(steps, clip=None)
    noise = np.zeros((program.num_rows, *x.shape))
    if case == "euler_ancestral":
        noise[:-1] = GOLDEN[f"{case}/noise"]
    states = run(program, network, x, noise)
    for row, expected in enumerate(GOLDEN[f"{case}/x_callback"][1:]):
        assert error(states[row], expected) < 1e-6, row
    assert error(states[-1], GOLDEN[f"{case}/final_f64"]) < 1e-6


def test_k_diffusion_churn():
    """Steps upwards are part of the rows before them; the first alone is a row, which calls no network."""
    network, x, sigmas = k_diffusion(GOLDEN, "euler_churn")
    gamma = Churn(20.0, 0.05, 50.0).gamma(sigmas[:-1], len(sigmas) - 1)
    before = np.flatnonzero(gamma)
    assert 0 < len(before) < len(gamma)
    steps = exploding_chain(np.insert(sigmas, before + 1, (sigmas[:-1] * (1 + gamma))[before]))
    program = euler(steps, clip=None, churn=Churn(s_noise=1.003))
    assert program.calls_network.tolist() == [False] + [True] * len(gamma)
    noise = np.zeros((program.num_rows, *x.shape))
    noise[program.column("c_z") != 0] = GOLDEN["euler_churn/noise"][before]
    states = run(program, network, x, noise)
    assert error(states[-1], GOLDEN["euler_churn/final_f64"]) < 1e-6


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("churn", [Churn(5.0), Churn(100.0, 0.1, 3.0, 1.01)])
def test_churn_of_a_process(churn, zero_snr):
    """Algorithm 2 in y = x/α; the network sees √ᾱ·x0 + √(1−ᾱ)·ε at the level and the time that belong together."""
    betas = scaled_linear_betas(1000)
    full = GaussianProcess(np.append(betas[:-1], 1.0) if zero_snr else betas, "v")
    process = full.respace(8)
    program = euler(process, clip=None, churn=churn, full=full)
    with np.errstate(divide="ignore"):
        table = np.sqrt(1 / full.alphas_cumprod - 1)
    levels = np.append(table[process.timestep_map[::-1]], 0.0)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    noise = np.random.default_rng(1).standard_normal((20, *x.shape))
    states = run(program, lambda x, t: NETWORK(x, np.full(len(x), t)), x, noise)

    draws = iter(noise[: program.num_rows][program.column("c_z") != 0])
    y, calls = (None if zero_snr else x * np.sqrt(1 + levels[0] ** 2)), []
    for now, then in itertools.pairwise(levels):
        if np.isinf(now):  # DDIM from pure noise: x0 = −v, ε = x
            y, calls = -NETWORK(x, np.full(2, 999.0)) + then * x, [999.0]
            continue
        gamma = min(churn.s_churn / 8, np.sqrt(2) - 1) if churn.s_min <= now <= churn.s_max else 0.0
        hat = now * (1 + gamma)
        if gamma:
            y = y + np.sqrt(hat**2 - now**2) * churn.s_noise * next(draws)
        calls.append(np.interp(np.log(hat), np.log(table), np.arange(1000)))
        output = NETWORK(y / np.sqrt(1 + hat**2), np.full(2, calls[-1]))
        x0 = y / (1 + hat**2) - output * hat / np.sqrt(1 + hat**2)
        y = y + (y - x0) / hat * (then - hat)
    assert next(draws, None) is None
    np.testing.assert_allclose(program.times[program.calls_network], calls, rtol=1e-9)
    assert error(states[-1], y) < 1e-10


def test_ancestral_steps_to_more_noise_add_none():
    """As where zero terminal SNR is held off at a level below the one before it."""
    program = euler_ancestral(single_steps([1.0], [4.0], [1.0], [5.0], [0], "x0"), clip=None)
    assert program.column("c_z").tolist() == [0]
    np.testing.assert_allclose(program.column("c_x"), 5 / 4)
    np.testing.assert_allclose(program.column("c_m"), -1 / 4)


def test_what_cannot_be():
    process = GaussianProcess(linear_betas(1000)).respace(4)
    with pytest.raises(ValueError, match=r"eta is 1.5"):
        euler_ancestral(process, eta=1.5)
    with pytest.raises(ValueError, match="s_noise is -1"):
        euler_ancestral(process, s_noise=-1)
    with pytest.raises(ValueError, match="s_churn is -1"):
        Churn(-1.0)
    with pytest.raises(ValueError, match=r"s_max is 1.0; it must be at least s_min, 2"):
        Churn(1.0, 2.0, 1.0)
    up = single_steps([1.0], [1.0], [1.0], [2.0], [0], "x0")
    with pytest.raises(ValueError, match="to churn Transitions"):
        euler(up, churn=Churn(1.0))
