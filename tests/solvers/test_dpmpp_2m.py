"""DPM-Solver++(2M): its order of accuracy, its first and last rows, and other people's implementations."""

import functools

import numpy as np
import pytest
import torch

from diffkern import backends
from diffkern.ops import solver_step
from diffkern.process import GaussianProcess, cosine_betas, linear_betas, scaled_linear_betas
from diffkern.solvers import build
from tests.golden_data import error, load
from tests.sampling import reference
from tests.solvers.executor import execute, new_slots
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.01, w=0.8)


def process_at(lambdas, prediction="eps"):
    """The process whose t-th step has log(α/σ) = lambdas[t], which fall."""
    abar = 1 / (1 + np.exp(-2 * np.asarray(lambdas)))
    return GaussianProcess(1 - abar / np.append(1.0, abar[:-1]), prediction)


def run(program, network, x):
    """The states (R, N, C, …) after each row, in float64; network(x, time)."""
    slots, states = new_slots(program, x), []
    for row in range(program.num_rows):
        x = execute(program, row, x, network(x, program.times[row]), slots=slots).x
        states.append(x)
    return np.array(states)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_it_is_the_papers_loop(steps, prediction, clip, variance):
    process = GaussianProcess(cosine_betas(1000), prediction, variance).respace(steps)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))

    def network(x, t):
        return NETWORK(x, np.full(len(x), t), var="range" if variance == "learned_range" else None)

    expected = reference.sample(
        lambda x, t: torch.from_numpy(network(x.numpy(), t)),
        process,
        torch.from_numpy(x),
        0,
        solver="dpmpp_2m",
        clip=clip,
    )
    states = run(build("dpmpp_2m", process, clip=clip), network, x)
    for row, (state, _) in enumerate(expected):
        assert error(states[row], state.numpy()) < 1e-11, row


@pytest.mark.parametrize(("solver", "order"), [("dpmpp_2m", 2), ("ddim", 1)])
def test_order_of_accuracy(solver, order):
    """On data N(μ, s²) with its exact ε; of the steps every second is twice as long, so that r counts."""
    mean, variance, first, last = 0.4, 0.3, -3.0, 3.0
    z = np.linspace(-2, 2, 9).reshape(1, 1, 9)

    def error_at(steps):
        lengths = np.tile([1.0, 2.0], steps // 2)
        process = process_at(last + (first - last) * np.append(0, np.cumsum(lengths) / lengths.sum()))
        alpha, sigma = process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod
        spread = np.sqrt(alpha**2 * variance + sigma**2)

        def network(x, t):
            a, s = alpha[int(t)], sigma[int(t)]
            x0 = mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)
            return (x - a * x0) / s

        states = run(build(solver, process, clip=None), network, alpha[-1] * mean + spread[-1] * z)
        # Of the ODE's solution, x at λ = 3; the last row leads on to λ = ∞.
        return np.abs(states[-2] - (alpha[0] * mean + spread[0] * z)).max()

    errors = [error_at(steps) for steps in (32, 64, 128, 256)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.15)


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("steps", [2, 10, 20])
def test_which_rows_remember_and_read(steps, clip):
    """The last row leads to λ = ∞ and is of first order however many steps there are, so the one before it writes
    nothing, and the first row reads nothing."""
    process = GaussianProcess(linear_betas(1000)).respace(steps)
    program, ddim = build("dpmpp_2m", process, clip=clip), build("ddim", process, clip=clip)
    reads = program.column("c_h0") != 0
    assert reads.tolist() == [0 < row < steps - 1 for row in range(steps)]
    assert (program.writes[:, 0] == 0).tolist() == [*reads[1:], False]
    for row in (0, -1):
        for name in ("c_x", "c_m", "c_0"):
            assert program.column(name)[row] == pytest.approx(ddim.column(name)[row], abs=1e-15)
    assert not program.makes_noise


def test_zero_terminal_snr_makes_the_second_row_first_order():
    """h of the first step is infinite, 1/r = 0: what is remembered from ᾱ = 0 counts nothing."""
    process = GaussianProcess(np.append(linear_betas(1000)[:-1], 1.0), "v").respace(6)
    assert process.alphas_cumprod[-1] == 0
    program = build("dpmpp_2m", process)
    assert np.flatnonzero(program.column("c_h0")).tolist() == [2, 3, 4]


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_op_runs_it_in_float32(backend, memory_format, clip):
    """From slots that hold NaN: the first row does not read them."""
    if reason := backends.unavailable(backend):
        pytest.skip(reason)
    program = build("dpmpp_2m", GaussianProcess(scaled_linear_betas(1000)), 10, clip=clip)
    start = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = run(program, lambda x, t: NETWORK(x, np.full(2, t)), start.astype(np.float64))
    x = torch.from_numpy(start).contiguous(memory_format=memory_format)
    slots = torch.full((1, *x.shape), torch.nan)
    for row in range(program.num_rows):
        output = torch.from_numpy(NETWORK(x.numpy(), np.full(2, program.times[row], dtype=np.float32)))
        with backends.use_backend(backend):
            x = solver_step(x, output, program, row, slots=slots)
        assert error(x.numpy(), expected[row]) < 5e-6, row


def test_k_diffusion_loop():
    """k-diffusion's sample_dpmpp_2m is the same solver of y = x/α, which has noise σ/α."""
    golden = load("k_diffusion")
    sigmas = golden["dpmpp_2m/sigmas"].astype(np.float64)[:-1]
    scale = np.sqrt(1 + sigmas**2)
    process = process_at(-np.log(sigmas[::-1]), "x0")
    network = functools.partial(net, **{k: golden.meta["stub"][k] for k in "abw"})

    x = golden["dpmpp_2m/x_init"] / scale[0]
    rows = len(sigmas) - 1 - np.arange(len(sigmas))
    program = build("dpmpp_2m", process, clip=None)
    assert program.times.tolist() == rows.tolist()
    states = run(program, lambda x, t: network(x, np.full(len(x), np.log(sigmas[rows[int(t)]]))), x)
    for row, expected in enumerate(golden["dpmpp_2m/x_callback"][1:]):
        assert error(states[row] * scale[row + 1], expected) < 1e-6, row
    assert error(states[-1], golden["dpmpp_2m/final_f64"]) < 1e-6


@pytest.mark.parametrize("steps", [2, 14, 15, 20])
@pytest.mark.parametrize(
    ("prediction", "name"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")], ids=["eps", "x0", "v"]
)
def test_diffusers_where_it_is_installed(prediction, name, steps):
    """Its lower_order_final holds below 15 steps; its final sigma of zero makes the last row first order anyway."""
    peer = pytest.importorskip("diffusers").DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=name
    )
    peer.set_timesteps(steps)
    timesteps = peer.timesteps.numpy()
    process = GaussianProcess(scaled_linear_betas(1000), prediction).keep(timesteps[::-1])

    def network(x, t):
        return NETWORK(x, np.full(len(x), float(t)))

    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    states = run(build("dpmpp_2m", process, clip=None), network, x)
    for t, state in zip(timesteps, states, strict=True):
        x = peer.step(torch.from_numpy(network(x, t)), int(t), torch.from_numpy(x)).prev_sample.numpy()
        assert error(state, x) < 1e-5, t
