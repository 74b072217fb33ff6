"""LMS and DEIS: other people's implementations, the integrals, and what the first and last rows do."""

import functools

import numpy as np
import pytest
import torch

from diffkern.process import GaussianProcess, cosine_betas, linear_betas, scaled_linear_betas
from diffkern.solvers import chain, deis, lms
from diffkern.solvers.lagrange import lagrange_integrals
from tests.golden_data import error, load
from tests.solvers.executor import trajectory
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.01, w=0.8)
SOLVERS = {"lms": lms, "deis": deis}


def at_time(x, t):
    return NETWORK(x, np.full(len(x), t))


def test_lagrange_integrals_are_those_of_polynomials():
    """e^u times a cubic through four points, by parts: [e^u·(p − p' + p'' − p''')]."""
    nodes, start, end = [-1.0, 0.2, 0.9, 1.5], 1.5, 2.5
    weights = lagrange_integrals(nodes, start, end, np.exp)
    for power in range(4):
        p = np.polynomial.Polynomial.basis(power)
        antiderivative = p - p.deriv() + p.deriv(2) - p.deriv(3)
        exact = np.exp(end) * antiderivative(end) - np.exp(start) * antiderivative(start)
        np.testing.assert_allclose(weights @ p(np.array(nodes)), exact, rtol=1e-13)


def test_lagrange_integrals_of_short_and_long_steps():
    """To rounding where closed forms cancel, and over a step in which e^u grows by 17 decades."""
    h = 1e-5
    np.testing.assert_allclose(lagrange_integrals([0, -h], 0, h, np.exp), [1.5 * h, -0.5 * h], rtol=2e-5)
    np.testing.assert_allclose(lagrange_integrals([0.0], -20, 20, np.exp), [np.exp(20) - np.exp(-20)], rtol=1e-12)


@pytest.mark.parametrize("clip", [None, (-1e9, 1e9)])
def test_k_diffusion_lms(clip):
    """Its state is (1, σ), to σ = 0; the fourth-order polynomials hold to the last row."""
    golden = load("k_diffusion")
    sigmas = golden["lms/sigmas"].astype(np.float64)
    network = functools.partial(net, **{k: golden.meta["stub"][k] for k in "abw"})
    times = np.arange(len(sigmas) - 1)

    def denoise(x, t):
        sigma = sigmas[int(t)]
        return network(x / np.sqrt(1 + sigma**2), np.full(len(x), np.log(sigma)))

    program = lms(chain(np.ones_like(sigmas), sigmas, times, "x0"), clip=clip)
    states = trajectory(program, denoise, golden["lms/x_init"].astype(np.float64))
    for state, expected in zip(states[:-1], golden["lms/x_callback"][1:], strict=True):
        assert error(state, expected) < 1e-6
    assert error(states[-1], golden["lms/final_f64"]) < 1e-6


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_diffusers_deis_where_it_is_installed(prediction, name, steps, order):
    """Its last row extrapolates to σ = 0 unless there are few, and ours is of first order: the states before agree.

    Its third-order weights are closed forms in float32, differences of nearly equal logarithms.
    """
    peer = pytest.importorskip("diffusers").DEISMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=name,
        solver_order=order,
        lower_order_final=False,
    )
    peer.set_timesteps(steps)
    timesteps = peer.timesteps.numpy()
    process = GaussianProcess(scaled_linear_betas(1000), prediction).keep(timesteps[::-1])
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    states = trajectory(deis(process, clip=None, order=order), at_time, x)
    for t, state in zip(timesteps[:-1], states[:-1], strict=True):
        x = peer.step(torch.from_numpy(at_time(x, t)), int(t), torch.from_numpy(x)).prev_sample.numpy()
        assert error(state, x) < (3e-5 if order == 3 else 1e-5), t


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_of_the_state(solver, prediction):
    """The state (1, σ/α) is (α, σ) divided by α, row by row."""
    process = GaussianProcess(cosine_betas(1000), prediction).respace(12)
    alpha, sigma = process.sqrt_alphas_cumprod[::-1], process.sqrt_one_minus_alphas_cumprod[::-1]
    levels = np.append(alpha, 1.0), np.append(sigma, 0.0)
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 3))
    ours = trajectory(SOLVERS[solver](chain(*levels, process.timestep_map[::-1], prediction), clip=(-1, 1)), at_time, x)
    same = trajectory(SOLVERS[solver](process, clip=(-1, 1)), at_time, x)
    np.testing.assert_allclose(ours, same, rtol=1e-10, atol=1e-12)

    def scaled(y, t):  # the network's output at (1, σ/α) means the same image
        i = process.timestep_map.tolist().index(t)
        s, n = process.sqrt_alphas_cumprod[i], process.sqrt_one_minus_alphas_cumprod[i]
        return process.convert((s * y)[:1], at_time(s * y, t), [i], prediction, "x0"), s, n

    exploding = chain(np.ones(13), levels[1] / levels[0], process.timestep_map[::-1], "x0")
    states = trajectory(SOLVERS[solver](exploding, clip=(-1, 1)), lambda y, t: scaled(y, t)[0], x / alpha[0])
    np.testing.assert_allclose(states * levels[0][1:, None, None, None, None], same, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rows_read_what_was_written_j_rows_before(order, solver, clip):
    steps = 9
    process = GaussianProcess(linear_betas(1000)).respace(steps)
    program = SOLVERS[solver](process, clip=clip, order=order)
    slots = order - 1
    assert program.num_slots == slots
    last = 1 if solver == "deis" else 0  # rows at the end that are of first order
    newest = [-1] * slots
    for row in range(steps):
        reads = [k for k in range(slots) if program.column(f"c_h{k}")[row] != 0]
        known = 0 if row >= steps - last else min(row, slots)
        assert sorted(newest[k] for k in reads) == list(range(row - known, row))
        if program.writes[row, 0] >= 0:
            assert program.writes[row, 0] == row % slots
            newest[row % slots] = row
    assert program.column("g0_x").all() if clip and slots else True


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_terminal_snr_counts_for_nothing(solver):
    """ρ is infinite there: the first row is DDIM's, and none reads what it said."""
    process = GaussianProcess(np.append(linear_betas(1000)[:-1], 1.0), "v").respace(6)
    program = SOLVERS[solver](process, order=4)
    assert program.writes[0, 0] == -1
    orders = [sum(program.column(f"c_h{k}")[row] != 0 for k in range(3)) for row in range(6)]
    assert orders == [0, 0, 1, 2, 3, 0 if solver == "deis" else 3]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("order", [0, 5, 2.5, "2", None])
def test_an_order_that_there_is_not(order, solver):
    with pytest.raises(ValueError, match=r"order is .*; it must be an int in \[1, 4\]"):
        SOLVERS[solver](GaussianProcess(linear_betas(100)), order=order)
