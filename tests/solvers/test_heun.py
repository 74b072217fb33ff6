"""Heun's method against the paper's loop, k-diffusion's numbers and its order of accuracy."""

import functools
import itertools

import numpy as np
import pytest

from diffkern.process import GaussianProcess, cosine_betas, linear_betas
from diffkern.solvers import Churn, chain, euler, heun, single_steps
from tests.golden_data import error, load
from tests.solvers.levels import LINEAR_LEVELS, SCALES, data, exploding_chain, k_diffusion, run, scaled
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.01, w=0.8)
GOLDEN = load("k_diffusion")


def x0_of(network, prediction, clip):
    """x0 of x = α·x0 + σ·ε from what the network says of it."""

    def x0(x, a, s, t):
        m, k2 = network(x, t), a**2 + s**2
        value = {"eps": (x - s * m) / a, "x0": m, "v": a / k2 * x - s / np.sqrt(k2) * m}[prediction]
        return value if clip is None else np.clip(value, *clip)

    return x0


def x0_of_sigma(x0, x, a, s, _):
    """x0 from a network that is given σ for a time."""
    return x0(x, a, s, s)


def papers_loop(x0, y, alpha, levels, times):
    """Algorithm 2 of arXiv 2206.00364 in y = x/α, without churn: the states after each step."""
    states = [y]
    for i, (now, then) in enumerate(itertools.pairwise(levels)):
        y = states[-1]
        d = (y - x0(alpha[i] * y, alpha[i], alpha[i] * now, times[i])) / now
        y_next = y + (then - now) * d
        if then > 0:
            a = alpha[i + 1]
            d2 = (y_next - x0(a * y_next, a, a * then, times[i + 1])) / then
            y_next = y + (then - now) * (d + d2) / 2
        states.append(y_next)
    return states


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_scale_of_x_goes_the_papers_way(prediction, scale, clip):
    alpha, sigma = scaled(scale, LINEAR_LEVELS)
    times = np.arange(len(alpha) - 1.0)
    program = heun(chain(alpha, sigma, times, prediction), clip=clip)
    assert program.times.tolist() == [t for i in range(8) for t in (i, i + 1)] + [8]
    assert program.num_slots == 1

    def network(x, t):
        return NETWORK(x, np.full(len(x), t))

    y, _ = data(LINEAR_LEVELS)
    states = run(program, network, y * alpha[0])
    expected = papers_loop(x0_of(network, prediction, clip), y, alpha, LINEAR_LEVELS, times)
    for step in range(9):
        row = min(2 * step + 1, 16)
        assert error(states[row] / alpha[step + 1], expected[step + 1]) < 1e-11, step


def test_a_chain_that_does_not_end_at_the_image_ends_with_eulers_step():
    levels = LINEAR_LEVELS[:-1]
    alpha, sigma = scaled("preserving", levels)
    steps = chain(alpha, sigma, np.arange(len(levels) - 1), "eps")
    program, other = heun(steps, clip=None), euler(steps, clip=None)
    assert program.num_rows == 2 * (len(levels) - 1) - 1
    np.testing.assert_allclose(program.column("c_m")[-1], other.column("c_m")[-1], rtol=1e-12)


def test_zero_terminal_snr_begins_with_eulers_step():
    process = GaussianProcess(np.append(linear_betas(1000)[:-1], 1.0), "v").respace(6)
    program = heun(process, clip=None)
    last, second, third = process.timestep_map[:-4:-1]
    assert program.times.tolist()[:4] == [last, second, third, third]
    assert program.column("c_h0")[:3].tolist() == [0, 0, 1]
    assert np.isfinite(program.coefficients).all()


def test_order_of_accuracy():
    """2, on data N(μ, s²) with its exact ε: the error falls as the square of the step."""
    mean, variance, levels = 0.4, 0.3, (20.0, 0.05)
    z = np.linspace(-2, 2, 9).reshape(1, 1, 9)

    def error_at(steps):
        sigmas = np.linspace(levels[0] ** (1 / 7), levels[1] ** (1 / 7), steps + 1) ** 7

        def network(x, s):
            return mean + variance / (variance + s**2) * (x - mean)

        program = heun(exploding_chain(np.append(sigmas, 0.0)), clip=None)
        states = run(program, network, mean + np.sqrt(variance + levels[0] ** 2) * z)
        return np.abs(states[-2] - (mean + np.sqrt(variance + levels[1] ** 2) * z)).max()

    errors = [error_at(steps) for steps in (32, 64, 128, 256)]
    np.testing.assert_allclose(np.log2(np.array(errors[:-1]) / errors[1:]), 2, atol=0.2)


def test_k_diffusion():
    network, x, sigmas = k_diffusion(GOLDEN, "heun")
    states = run(heun(exploding_chain(sigmas), clip=None), network, x)
    for step, expected in enumerate(GOLDEN["heun/x_callback"][1:]):
        assert error(states[2 * step + 1], expected) < 1e-6, step
    assert error(states[-1], GOLDEN["heun/final_f64"]) < 1e-6


@pytest.mark.parametrize("clip", [None, (-1, 1)])
def test_churn(clip):
    """Noise before a step belongs to the row that ends the step before; the first is a row without a network."""
    levels = LINEAR_LEVELS
    churn = Churn(2.0, 1.0, 18.0, 1.01)
    gamma = churn.gamma(levels[:-1], len(levels) - 1)
    assert gamma[0] == 0 < gamma[1] < np.sqrt(2) - 1
    for first in (0, 1):  # beginning where there is none, and with some
        now, g = levels[first:], gamma[first:]
        before = np.flatnonzero(g)
        hatted = (now[:-1] * (1 + g))[before]
        steps = exploding_chain(np.insert(now, before + 1, hatted))
        program = heun(steps, clip=clip, churn=Churn(s_noise=1.01))
        assert program.calls_network.tolist() == [first == 0, *[True] * (program.num_rows - 1)]
        y, noise = data(now)
        drawn = np.zeros((program.num_rows, *y.shape))
        drawn[program.column("c_z") != 0] = noise[before]

        def network(x, s):
            return NETWORK(x, np.full(len(x), s))

        expected, of_sigma = y, functools.partial(x0_of_sigma, x0_of(network, "x0", clip))
        for i, (a, b) in enumerate(itertools.pairwise(now)):
            hat = a * (1 + g[i])
            start = expected + np.sqrt(hat**2 - a**2) * 1.01 * noise[i]
            expected = papers_loop(of_sigma, start, np.ones(2), [hat, b], [0, 0])[-1]
        assert error(run(program, network, y, drawn)[-1], expected) < 1e-11


def test_churn_of_a_process():
    full = GaussianProcess(cosine_betas(1000))
    process = full.respace(6)
    program = heun(process, churn=Churn(3.0), full=full)
    assert program.calls_network.tolist() == [False] + [True] * 11
    assert (program.column("c_z") != 0).sum() == 6
    assert ((program.times >= 0) & (program.times <= 999)).all()


def test_what_cannot_be():
    apart = single_steps([1.0, 1.0], [3.0, 1.0], [1.0, 1.0], [2.0, 0.5], [1, 0], "x0")
    with pytest.raises(ValueError, match=r"row 1 of the Transitions begins at sigma = 1.0, but the one before it ends"):
        heun(apart)
