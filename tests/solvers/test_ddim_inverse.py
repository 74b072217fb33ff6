"""DDIM inversion: it leads to the noise that DDIM leads back from."""

import functools

import numpy as np
import pytest
import torch

from diffkern.process import GaussianProcess, linear_betas, scaled_linear_betas, zero_terminal_snr
from diffkern.process.gaussian import PREDICTIONS
from diffkern.solvers import ddim, ddim_inverse
from tests.golden_data import error
from tests.solvers.executor import trajectory
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.01, w=0.8)
IMAGE = np.tanh(np.random.default_rng(0).standard_normal((2, 3, 4, 4)))


def smooth(x, t):
    """An ε that the ODE carries without strain."""
    return 0.5 * np.tanh(x) + 0.2 * np.sin(x + t / 400)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_it_returns_exactly_where_eps_does_not_depend_on_x(variance):
    """Row for row: the inversion visits DDIM's states backwards."""
    process = GaussianProcess(linear_betas(1000), variance=variance).respace(20)

    def network(x, t):
        channels = 2 if variance == "learned_range" else 1
        return np.full((len(x), channels * x.shape[1], *x.shape[2:]), np.sin(t))

    there = trajectory(ddim_inverse(process), network, IMAGE)
    back = trajectory(ddim(process, clip=None), network, there[-1])
    np.testing.assert_allclose(back[-1], IMAGE, atol=1e-11)
    np.testing.assert_allclose(back[:-1], there[-2::-1], atol=1e-11)


@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p != "x_prev"])
def test_the_round_trip_is_of_first_order(prediction):
    base = GaussianProcess(linear_betas(4000), prediction)
    errors = []
    for steps in (125, 250, 500, 1000):
        process = base.respace(steps)
        index = {int(t): i for i, t in enumerate(process.timestep_map)}

        def network(x, t, process=process, index=index):
            return process.convert(x, smooth(x, t / 4), np.full(len(x), index[int(t)]), "eps", prediction)

        noise = trajectory(ddim_inverse(process), network, IMAGE)[-1]
        errors.append(np.abs(trajectory(ddim(process, clip=None), network, noise)[-1] - IMAGE).max())
    assert errors[-1] < 0.05
    np.testing.assert_allclose(np.log2(np.array(errors[:-1]) / errors[1:]), 1, atol=0.25)


def test_x_prev():
    """A network that predicts the mean of x_{t−1} says an ε as well."""
    process, same = (GaussianProcess(linear_betas(1000), p).respace(10) for p in ("x_prev", "eps"))
    index = {int(t): i for i, t in enumerate(process.timestep_map)}

    def network(x, t):
        return process.convert(x, smooth(x, t), np.full(len(x), index[int(t)]), "eps", "x_prev")

    np.testing.assert_allclose(
        trajectory(ddim_inverse(process), network, IMAGE), trajectory(ddim_inverse(same), smooth, IMAGE), rtol=1e-9
    )


@pytest.mark.parametrize("clip", [None, (-1, 1)])
def test_diffusers_where_it_is_installed(clip):
    peer = pytest.importorskip("diffusers").DDIMInverseScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=clip is not None
    )
    peer.set_timesteps(20)
    timesteps = peer.timesteps.numpy()
    process = GaussianProcess(scaled_linear_betas(1000)).keep(timesteps)
    x = IMAGE
    states = trajectory(ddim_inverse(process, clip=clip), lambda x, t: NETWORK(x, np.full(len(x), t)), x)
    for t, state in zip(timesteps, states, strict=True):
        output = torch.from_numpy(NETWORK(x, np.full(len(x), float(t))))
        x = peer.step(output, int(t), torch.from_numpy(x)).prev_sample.numpy()
        assert error(state, x) < 1e-5, t


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_to_zero_terminal_snr(prediction):
    """The last state is ε alone: x itself, or the network's own."""
    process = GaussianProcess(zero_terminal_snr(linear_betas(1000)), prediction).respace(10)
    program = ddim_inverse(process)
    assert np.isfinite(program.coefficients).all()
    assert program.times.tolist() == process.timestep_map.tolist()
    states = trajectory(program, lambda x, t: 0.3 * x, IMAGE)
    np.testing.assert_allclose(states[-1], states[-2], atol=1e-12)
    with pytest.raises(ValueError, match=r"alphas_cumprod\[9\] is 0"):
        ddim_inverse(GaussianProcess(process.betas))
