"""Orders of convergence: the error against the exact solution of the probability-flow ODE of a mixture of Gaussians."""

import numpy as np
import pytest

from benchmarks.convergence import (
    LAST,
    MEANS,
    STARTS,
    STDS,
    WEIGHTS,
    denoise,
    exact,
    grid,
    levels,
    network,
    program,
    run,
)
from diffkern.process import GaussianProcess
from diffkern.solvers import SOLVERS, Transitions
from tests.solvers.executor import execute, new_slots, trajectory

ORDERS = {
    "ddim": 1,
    "plms": 2,  # its weights integrate polynomials, but not times dρ (Liu et al. 2022, arXiv 2202.09778, section 3.4)
    "euler": 1,
    "heun": 2,
    "lms": 4,
    "deis": 3,
    "dpm_solver_2": 2,
    "dpm_solver_3": 3,
    "dpm_solver_2m": 2,
    "dpm_solver_3m": 3,
    "dpmpp_1s": 1,
    "dpmpp_2s": 2,
    "dpmpp_3s": 3,
    "dpmpp_2m": 2,
    "dpmpp_3m": 3,
    "unipc": 3,
}
# Where every second step is twice as long: see `dpm_singlestep`; and the weights of `plms` are those of equal steps.
ALTERNATING = ORDERS | {"dpm_solver_3": 2, "dpmpp_3s": 2, "plms": 1}
STOCHASTIC = ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"]
OWN_STEPS = ["pndm"]  # no Transitions: tests/solvers/test_pndm.py has its order


def final(name, steps, **options):
    """x at the end, by the tests' own executor in NumPy."""
    table = program(name, steps, **options)
    return trajectory(table, network, STARTS.reshape(1, 1, -1))[-1].reshape(-1)


def slope(solve, reference, counts=(192, 384, 768)):
    errors = [np.abs(solve(steps) - reference).max() for steps in counts]
    return np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("scipy")
    return exact()


def test_every_solver_has_its_place_here():
    assert sorted([*ORDERS, *STOCHASTIC, *OWN_STEPS]) == sorted(SOLVERS)


def test_the_reference_is_exact(reference):
    """x moves as its distribution does: the part of the mixture below it stays the same."""
    from scipy.stats import norm

    def below(x, lam):
        alpha, sigma = levels(np.float64(lam))
        return (WEIGHTS * norm.cdf(x[:, None], alpha * MEANS, np.sqrt(alpha**2 * STDS**2 + sigma**2))).sum(-1)

    np.testing.assert_allclose(below(reference, LAST), below(STARTS, -8.0), atol=1e-11)


def test_the_denoiser_is_the_posterior_mean():
    x0 = np.linspace(-8, 8, 200001)
    density = (WEIGHTS * np.exp(-((x0[:, None] - MEANS) ** 2) / (2 * STDS**2)) / STDS).sum(-1)
    alpha, sigma = levels(np.float64(0.4))
    for x in (-1.3, 0.2, 2.0):
        weight = density * np.exp(-((x - alpha * x0) ** 2) / (2 * sigma**2))
        np.testing.assert_allclose(denoise(np.array([x]), 0.4), (weight * x0).sum() / weight.sum(), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "order", "uneven"),
    [
        *((name, order, 1.0) for name, order in ORDERS.items()),
        *((name, order, 2.0) for name, order in ALTERNATING.items()),
    ],
)
def test_order(name, order, uneven, reference):
    """Also where every second step is twice as long, so that the ratios of the steps count."""
    measured = slope(lambda steps: final(name, grid(steps, uneven=uneven)), reference)
    assert -measured == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", ["lms", "deis"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_orders_to_choose_from(order, name, reference):
    measured = slope(lambda steps: final(name, grid(steps), order=order), reference)
    assert -measured == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_what_the_network_predicts_changes_nothing(prediction, reference):
    def predicted(x, lam):
        alpha, sigma = levels(np.float64(lam))
        x0, eps = denoise(x, lam), network(x, lam)
        return {"x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

    for name in ORDERS:
        x = STARTS.reshape(1, 1, -1)
        ours = trajectory(program(name, grid(24, prediction)), predicted, x)
        same = trajectory(program(name, grid(24)), network, x)
        np.testing.assert_allclose(ours, same, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("name", ORDERS)
def test_the_op_in_float64_is_the_same(name, reference):
    steps = grid(24, uneven=2.0)
    np.testing.assert_allclose(run(program(name, steps)), final(name, steps), rtol=1e-11, atol=1e-12)


def test_higher_orders_are_nearer(reference):
    """With 24 network evaluations already."""
    errors = {name: np.abs(final(name, grid(24)) - reference).max() for name in ("ddim", "dpmpp_2m", "deis")}
    assert errors["ddim"] > 8 * errors["dpmpp_2m"] > 16 * errors["deis"]


@pytest.mark.parametrize("uneven", [1.0, 2.0])
def test_two_derivations_of_one_method(uneven):
    """DEIS in log ρ interpolates what DPM-Solver multistep expands: the same polynomials, from quadrature and by φ."""
    steps = grid(24, uneven=uneven)
    np.testing.assert_allclose(final("deis", steps), final("dpm_solver_3m", steps, solver_type="heun"), rtol=1e-11)


def gaussian_process(steps):
    """The levels of `steps` as a process whose network is told the index of its level."""
    abar = steps.alpha[::-1] ** 2
    return GaussianProcess(1 - abar / np.append(1.0, abar[:-1]))


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in STOCHASTIC), ("ddim", {"eta": 1.0})])
def test_stochastic_solvers_draw_from_the_mixture(name, options):
    """Mean and variance of 40000 samples in 200 steps to λ = 4: within 4 standard errors and 1 %."""
    lambdas = np.linspace(-6.0, 4.0, 201)
    alpha, sigma = levels(lambdas)
    process = gaussian_process(Transitions(alpha, sigma, *[alpha] * 7))
    table = SOLVERS[name].function(process, clip=None, threshold=None, **{**SOLVERS[name].fixed, **options})
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 40000))
    slots = new_slots(table, x)
    for row, t in enumerate(table.times):
        output = network(x, lambdas[::-1][int(t)])
        x = execute(table, row, x, output, rng.standard_normal(x.shape), slots).x
    mean = (WEIGHTS * MEANS).sum()
    variance = (WEIGHTS * (STDS**2 + MEANS**2)).sum() - mean**2
    assert x.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / x.size) + 0.01)
    assert x.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / x.size) + 0.01)
