"""DPM-Solver and DPM-Solver++ singlestep: the papers' steps, another implementation, and how rows are grouped."""

import functools

import numpy as np
import pytest
import torch

from diffkern.process import GaussianProcess, cosine_betas, linear_betas, scaled_linear_betas
from diffkern.solvers import chain, ddim, dpm_singlestep
from tests.golden_data import error
from tests.solvers.executor import trajectory
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.01, w=0.8)
X = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
both = pytest.mark.parametrize("predicts", ["eps", "x0"])


def at_time(x, t):
    return NETWORK(x, np.full(len(x), t))


def group_of(lambdas):
    """α and σ of levels with the given λ, and the transitions between them, whose network predicts eps."""
    alpha = 1 / np.sqrt(1 + np.exp(-2 * np.asarray(lambdas)))
    sigma = np.sqrt(1 - alpha**2)
    return alpha, sigma, chain(alpha, sigma, np.arange(len(lambdas) - 1), "eps")


@pytest.mark.parametrize("middle", [0.5, 0.3])
def test_dpm_solver_2_is_the_papers_step(middle):
    """arXiv 2206.00927, algorithm 1, for any r instead of ½."""
    start, h = -0.7, 1.1
    alpha, sigma, steps = group_of([start, start + middle * h, start + h])
    eps = at_time(X, 0)
    u = alpha[1] / alpha[0] * X - sigma[1] * np.expm1(middle * h) * eps
    change = at_time(u, 1) - eps
    expected = alpha[2] / alpha[0] * X - sigma[2] * np.expm1(h) * (eps + change / (2 * middle))
    states = trajectory(dpm_singlestep(steps, clip=None, order=2, predicts="eps"), at_time, X)
    np.testing.assert_allclose(states, [u, expected], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("middle", [0.5, 0.3])
@pytest.mark.parametrize("clip", [None, (-1, 1)])
def test_dpm_solver_pp_2s_is_the_papers_step(clip, middle):
    """arXiv 2211.01095, algorithm 1."""
    start, h = -0.7, 1.1
    alpha, sigma, steps = group_of([start, start + middle * h, start + h])

    def image(x, i):
        x0 = (x - sigma[i] * at_time(x, i)) / alpha[i]
        return x0 if clip is None else np.clip(x0, *clip)

    x0 = image(X, 0)
    u = sigma[1] / sigma[0] * X - alpha[1] * np.expm1(-middle * h) * x0
    data = (1 - 1 / (2 * middle)) * x0 + 1 / (2 * middle) * image(u, 1)
    expected = sigma[2] / sigma[0] * X - alpha[2] * np.expm1(-h) * data
    states = trajectory(dpm_singlestep(steps, clip=clip, order=2), at_time, X)
    np.testing.assert_allclose(states, [u, expected], rtol=1e-12, atol=1e-13)


@both
def test_three_points_integrate_a_quadratic_exactly(predicts):
    """A network whose answer is a quadratic in λ, whatever x is: the last state is the ODE's."""
    lambdas = np.array([-0.7, -0.2, 0.3, 0.7])
    alpha, sigma, _ = group_of(lambdas)
    p = np.polynomial.Polynomial([0.3, -0.8, 0.5])
    steps = chain(alpha, sigma, lambdas[:-1], predicts)
    states = trajectory(
        dpm_singlestep(steps, clip=None, order=3, predicts=predicts), lambda x, lam: np.full_like(x, p(lam)), X
    )
    if predicts == "x0":  # ∫ e^λ·p = [e^λ·(p − p' + p'')]
        antiderivative = [np.exp(lam) * (p - p.deriv() + p.deriv(2))(lam) for lam in lambdas]
        exact = sigma[3] / sigma[0] * X + sigma[3] * (antiderivative[3] - antiderivative[0])
    else:  # ∫ e^−λ·p = [−e^−λ·(p + p' + p'')]
        antiderivative = [-np.exp(-lam) * (p + p.deriv() + p.deriv(2))(lam) for lam in lambdas]
        exact = alpha[3] / alpha[0] * X - alpha[3] * (antiderivative[3] - antiderivative[0])
    np.testing.assert_allclose(states[-1], exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("order", "steps", "kind"), [(1, 6, "midpoint"), (2, 7, "midpoint"), (2, 21, "midpoint"), (3, 10, "heun")]
)
@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
@both
def test_diffusers_where_it_is_installed(predicts, prediction, name, steps, order, kind):
    """Its third order through all three points is called "heun" there. The last row leads to σ = 0 in ours alone."""
    peer = pytest.importorskip("diffusers").DPMSolverSinglestepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=name,
        solver_order=order,
        solver_type=kind,
        algorithm_type={"eps": "dpmsolver", "x0": "dpmsolver++"}[predicts],
        lower_order_final=True,
        final_sigmas_type="sigma_min",
    )
    peer.set_timesteps(steps)
    timesteps = peer.timesteps.numpy()
    process = GaussianProcess(scaled_linear_betas(1000), prediction).keep(timesteps[::-1])
    program = dpm_singlestep(process, clip=None, order=order, predicts=predicts)
    x = X
    states = trajectory(program, at_time, x)
    for t, state in zip(timesteps[:-1], states[:-1], strict=True):
        x = peer.step(torch.from_numpy(at_time(x, t)), int(t), torch.from_numpy(x)).prev_sample.numpy()
        assert error(state, x) < 2e-5, t


@both
@pytest.mark.parametrize(
    ("order", "steps", "sizes"),
    [
        (1, 4, [1, 1, 1, 1]),
        (2, 1, [1]),
        (2, 7, [2, 2, 2, 1]),
        (2, 8, [2, 2, 2, 1, 1]),
        (3, 7, [3, 3, 1]),
        (3, 9, [3, 3, 2, 1]),
    ],
)
def test_groups(order, steps, sizes, predicts):
    """The last row returns x0 by itself; the first row of each group is a step of DDIM and reads no slot."""
    process = GaussianProcess(cosine_betas(1000)).respace(steps)
    program = dpm_singlestep(process, order=order, predicts=predicts)
    starts = np.cumsum([0, *sizes])[:-1]
    reads = np.zeros(steps, dtype=bool)
    for k in range(program.num_slots):
        reads |= program.column(f"c_h{k}") != 0
    assert np.flatnonzero(~reads).tolist() == starts.tolist()
    plain = ddim(process)
    for name in ("c_x", "c_0"):
        np.testing.assert_allclose(program.column(name)[starts], plain.column(name)[starts], rtol=1e-12)
    for start, size in zip(starts, sizes, strict=True):
        expected = [[0, 1], [2, -1], [-1, -1]][:size] if size > 1 else [[-1, -1]]
        expected[-1] = [-1, -1]
        assert program.writes[start : start + size].tolist() == expected
    assert program.num_slots == (order + 1 if max(sizes) > 1 else 0)


@both
def test_zero_terminal_snr_is_a_group_of_its_own(predicts):
    process = GaussianProcess(np.append(linear_betas(1000)[:-1], 1.0), "v").respace(6)
    program = dpm_singlestep(process, order=2, predicts=predicts)
    assert (program.writes[:, 0] == 0).tolist() == [False, True, False, True, False, False]
    assert np.isfinite(program.coefficients).all()


def test_errors_name_the_argument():
    process = GaussianProcess(linear_betas(100))
    for order in (0, 4, 1.5, None):
        with pytest.raises(ValueError, match=r"order is .*; it must be an int in \[1, 3\]"):
            dpm_singlestep(process, order=order)
    with pytest.raises(ValueError, match="predicts is 'v'; it may be 'eps' or 'x0'"):
        dpm_singlestep(process, predicts="v")
