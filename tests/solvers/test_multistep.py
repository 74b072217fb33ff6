"""DPM-Solver multistep and UniPC: steps against integrals, orders of accuracy, and the steps where λ is infinite."""

import functools

import numpy as np
import pytest

from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import chain, columns
from diffkern.solvers.dpm_multistep import dpm_multistep
from diffkern.solvers.exponential import phi
from diffkern.solvers.unipc import unipc
from tests.golden_data import error
from tests.solvers.executor import execute, new_slots
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.3, w=0.8)
ALGORITHMS = ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"]


def levels(lambdas):
    """(α, σ), variance preserving, of λ = log(α/σ)."""
    abar = 1 / (1 + np.exp(-2 * np.asarray(lambdas, dtype=np.float64)))
    return np.sqrt(abar), np.sqrt(1 - abar)


LAMBDAS = np.cumsum([-4.0, 0.9, 0.4, 1.3, 0.7, 1.1, 0.5, 1.6])
ALPHA, SIGMA = levels(LAMBDAS)
ROWS = len(LAMBDAS) - 1
STEPS = chain(ALPHA, SIGMA, np.arange(ROWS), "eps")
START = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
GAPS = chain(np.append(ALPHA[[0, 1, 2, 2, 3]], 1.0), np.append(SIGMA[[0, 1, 2, 2, 3]], 0.0), np.arange(5), "eps")
NOISE = np.random.default_rng(1).standard_normal((ROWS, 2, 3, 4, 5))


def run(program, x=START, network=lambda x, i: NETWORK(x, np.full(len(x), i)), noise=NOISE):
    """The states (R, N, C, …) after each row, in float64; network(x, row)."""
    slots, states = new_slots(program, x), []
    for row in range(program.num_rows):
        drawn = noise[row] if program.column("c_z")[row] else None
        x = execute(program, row, x, network(x, row), drawn, slots).x
        states.append(x)
    return np.array(states)


def integral(weight, points, values, low, high):
    """∫ weight(λ)·p(λ) dλ from low to high, p the polynomial through the values at the points."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    at = low + (high - low) * (nodes + 1) / 2
    total = 0.0
    for k, value in enumerate(values):
        basis = np.prod([(at - p) / (points[k] - p) for j, p in enumerate(points) if j != k], axis=0) * np.ones(40)
        total = total + (high - low) / 2 * (weights * weight(at) * basis).sum() * value
    return total


def exact_step(i, x, points, values, data):
    """x at λ_{i+1} of the ODE from λ_i, where the prediction is the polynomial through what is known of it."""
    a, s, low, high = ALPHA[i + 1], SIGMA[i + 1], LAMBDAS[i], LAMBDAS[i + 1]
    if data:
        return s / SIGMA[i] * x + s * integral(np.exp, points, values, low, high)
    return a / ALPHA[i] * x - a * integral(lambda at: np.exp(-at), points, values, low, high)


def prediction(x, i, data):
    eps = NETWORK(x, np.full(len(x), i))
    return (x - SIGMA[i] * eps) / ALPHA[i] if data else eps


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_row_is_the_integral_of_the_interpolated_prediction(algorithm, order):
    """Of the variation of constants (Lu et al. 2022, eqs. 3.4 and 9; the SDE's, arXiv 2211.01095, appendix B)."""
    data, stochastic = algorithm.endswith("++"), algorithm.startswith("sde-")
    x, known, expected = START, [], []
    for i in range(ROWS):
        known.append(prediction(x, i, data))
        last = range(i, max(i - order, -1), -1)
        points, values = [LAMBDAS[j] for j in last], [known[j] for j in last]
        low, high = LAMBDAS[i], LAMBDAS[i + 1]
        h, a, s = high - low, ALPHA[i + 1], SIGMA[i + 1]
        if not stochastic:
            x = exact_step(i, x, points, values, data)
        elif data:
            pull = 2 * a * integral(lambda at, end=high: np.exp(-2 * (end - at)), points, values, low, high)
            x = s / SIGMA[i] * np.exp(-h) * x + pull + s * np.sqrt(1 - np.exp(-2 * h)) * NOISE[i]
        else:
            pull = 2 * a * integral(lambda at: np.exp(-at), points, values, low, high)
            x = a / ALPHA[i] * x - pull + s * np.sqrt(np.exp(2 * h) - 1) * NOISE[i]
        expected.append(x)
    program = dpm_multistep(STEPS, algorithm=algorithm, orders=order, solver_type="heun", clip=None)
    assert program.makes_noise == stochastic
    assert error(run(program), np.array(expected)) < 1e-11


def test_midpoint_is_algorithm_2():
    program = dpm_multistep(STEPS, algorithm="dpmsolver++", orders=2, clip=(-0.8, 0.8))
    x, before, expected = START, None, []
    for i in range(ROWS):
        x0 = np.clip(prediction(x, i, data=True), -0.8, 0.8)
        h = LAMBDAS[i + 1] - LAMBDAS[i]
        d = x0
        if i:
            r = (LAMBDAS[i] - LAMBDAS[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x, before = SIGMA[i + 1] / SIGMA[i] * x - ALPHA[i + 1] * np.expm1(-h) * d, x0
        expected.append(x)
    assert error(run(program), np.array(expected)) < 1e-12


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_unipc_corrects_and_predicts_by_the_interpolated_prediction(order, variant, data):
    """A corrector of order p ≥ 2 and a predictor of order p ≥ 3 integrate the polynomial through all they know, for
    then ρ solves the conditions that make this exact; the others are eq. 3 with ρ = ½."""
    x, known, states, expected = START, [], [], []
    for i in range(ROWS):
        now = prediction(x, i, data)
        if i:
            p = min(order, i)
            last = range(i - 1, i - 1 - p, -1)
            x = _exact_or_half(i - 1, states[-1], [*last, i], [*known, now], data, variant, half=p == 1)
        known.append(now)
        states.append(x)
        p = min(order, i + 1)
        x = _exact_or_half(i, x, list(range(i, i - p, -1)), known, data, variant, half=p == 2)
        expected.append(x)
    program = unipc(STEPS, orders=order, variant=variant, predict_x0=data, clip=None)
    assert error(run(program), np.array(expected)) < 1e-10


def _exact_or_half(i, x, at, known, data, variant, half):
    if not half:
        return exact_step(i, x, [LAMBDAS[j] for j in at], [known[j] for j in at], data)
    h = LAMBDAS[i + 1] - LAMBDAS[i]
    z, scale = (-h, ALPHA[i + 1]) if data else (h, SIGMA[i + 1])
    b = z if variant == "bh1" else np.expm1(z)
    [other] = [j for j in at if j != i]
    r = (LAMBDAS[other] - LAMBDAS[i]) / h
    return exact_step(i, x, [LAMBDAS[i]], [known[i]], data) - scale * b * 0.5 * (known[other] - known[i]) / r


SOLVERS = {
    "dpmpp 1": (1, functools.partial(dpm_multistep, orders=1)),
    "dpmpp 2 midpoint": (2, functools.partial(dpm_multistep, orders=2)),
    "dpmpp 2 heun": (2, functools.partial(dpm_multistep, orders=2, solver_type="heun")),
    "dpmpp 3": (3, functools.partial(dpm_multistep, orders=3)),
    "dpmpp 3 lu": (2, functools.partial(dpm_multistep, orders=3, third="lu")),
    "dpm 2": (2, functools.partial(dpm_multistep, algorithm="dpmsolver", orders=2)),
    "dpm 3": (3, functools.partial(dpm_multistep, algorithm="dpmsolver", orders=3)),
    "unipc 1": (2, functools.partial(unipc, orders=1)),
    "unipc 2": (3, functools.partial(unipc, orders=2)),
    "unipc 2 bh1": (3, functools.partial(unipc, orders=2, variant="bh1")),
    "unipc 2 eps": (3, functools.partial(unipc, orders=2, predict_x0=False)),
    "unip 2": (2, functools.partial(unipc, orders=2, corrector=False)),
    "unipc 3": (4, functools.partial(unipc, orders=3)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_accuracy(name):
    """On data N(μ, s²) with its exact ε; of the steps every second is twice as long. From rows of lower order at the
    start, short ones here, nothing is to be seen."""
    order, solver = SOLVERS[name]
    mean, variance, z = 0.4, 0.3, np.linspace(-2, 2, 9).reshape(1, 1, 9)

    def error_at(steps):
        lengths = np.tile([1.0, 2.0], steps // 2)
        start = np.logspace(-6, -1, 12) * lengths[0]  # a ramp of short steps
        path = np.append(0, np.cumsum(np.append(start, lengths)))
        alpha, sigma = levels(-3 + 6 * path / path[-1])
        spread = np.sqrt(alpha**2 * variance + sigma**2)

        def network(x, i):
            a, s = alpha[i], sigma[i]
            return (x - a * (mean + a * variance / (a**2 * variance + s**2) * (x - a * mean))) / s

        program = solver(chain(alpha, sigma, np.arange(len(alpha) - 1), "eps"), clip=None)
        states = run(program, alpha[0] * mean + spread[0] * z, network)
        exact = alpha[1:, None, None, None] * mean + spread[1:, None, None, None] * z
        return np.abs(states - exact).max()

    errors = [error_at(steps) for steps in (32, 64, 128)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders[-1] == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(
    "solver",
    [
        functools.partial(dpm_multistep, orders=3, solver_type="heun"),
        functools.partial(dpm_multistep, algorithm="sde-dpmsolver++", orders=3),
        functools.partial(dpm_multistep, algorithm="dpmsolver", orders=3),
        functools.partial(unipc, orders=3, variant="bh1", corrector=False),
        functools.partial(unipc, orders=3, variant="bh2", corrector=False),
        functools.partial(unipc, orders=3, variant="bh1", predict_x0=False, corrector=False),
    ],
)
def test_where_a_step_is_infinite_or_empty(solver):
    """To σ = 0 the step is of first order and returns x0; one of length 0 changes nothing."""
    program = solver(GAPS, clip=None)
    for row, expected in ((2, {"c_x": 1.0}), (4, {"c_x": 1 / ALPHA[3], "c_m": -SIGMA[3] / ALPHA[3]})):
        for name in columns(program.num_slots):
            if name.startswith("c_"):
                assert program.column(name)[row] == pytest.approx(expected.get(name, 0.0), abs=1e-12), (row, name)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_a_corrector_of_steps_that_are_infinite_or_empty(variant, predict_x0):
    """What step_program takes is finite; the state that an empty step came to stays what it was."""
    program = unipc(GAPS, orders=3, variant=variant, predict_x0=predict_x0, clip=None, history=3)
    kept = {name: program.column(name)[3] for name in columns(program.num_slots) if name.startswith("g0_")}
    assert kept.pop("g0_h0") == 1
    assert not any(kept.values())


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_ends_at_sigma_0_in_x0(variant):
    """However high an order is asked for: there bh1's B is infinite."""
    alpha, sigma = np.append(ALPHA, 1.0), np.append(SIGMA, 0.0)
    steps = chain(alpha, sigma, np.arange(ROWS + 1), "x0")
    program = unipc(steps, orders=3, variant=variant, corrector=False, clip=None)
    assert program.column("c_m")[-1] == 1
    assert [n for n in columns(program.num_slots) if n.startswith("c_") and program.column(n)[-1]] == ["c_m"]


def test_zero_terminal_snr():
    """λ = −∞ at the start: the rows after it have no slope to go by, and nothing is infinite."""
    process = GaussianProcess(np.append(linear_betas(1000)[:-1], 1.0), "v").respace(6)
    for program in (dpm_multistep(process, orders=3), unipc(process, orders=3), unipc(process, variant="bh1")):
        reads = [name for name in columns(program.num_slots) if name.startswith("c_h")]
        assert not any(program.column(name)[0] for name in reads)
    program = dpm_multistep(process, orders=3)
    assert [sum(program.column(f"c_h{k}")[i] != 0 for k in (0, 1)) for i in range(6)] == [0, 0, 1, 2, 2, 0]


@pytest.mark.parametrize("solver", [dpm_multistep, unipc])
def test_more_slots_change_nothing(solver):
    expected = run(solver(STEPS, orders=3, clip=(-0.8, 0.8)))
    program = solver(STEPS, orders=3, clip=(-0.8, 0.8), history=4)
    assert (program.writes[:, 0] >= 0).all()
    np.testing.assert_allclose(run(program), expected, rtol=0, atol=1e-12)
    for row, written in enumerate(program.writes):
        for k in written[written >= 0]:
            families = ("c", "g0", "g1")
            assert not any(program.column(f"{f}_h{k}")[row] for f in families), "a row reads what it overwrites"


def test_the_orders_of_rows():
    mixed = dpm_multistep(STEPS, orders=[3, 3, 2, 3, 1, 3, 2], clip=None)
    by_order = {p: dpm_multistep(STEPS, orders=p, clip=None, history=2) for p in (1, 2, 3)}
    for row, order in enumerate([1, 2, 2, 3, 1, 3, 2]):
        for name in columns(2):
            if name.startswith("c_"):
                assert mixed.column(name)[row] == by_order[order].column(name)[row], (row, name)


def test_a_corrector_for_some_rows():
    chosen = np.array([False, True, False, False, True, True, False])
    some, all_, none = (unipc(STEPS, corrector=c, clip=None, history=3) for c in (chosen, True, False))
    orders = unipc(STEPS, corrector=np.where(chosen, [0, 1, 2, 2, 2, 2, 2], 0), clip=None, history=3)
    np.testing.assert_array_equal(some.coefficients, orders.coefficients)
    np.testing.assert_array_equal(some.coefficients[chosen], all_.coefficients[chosen])
    np.testing.assert_array_equal(some.coefficients[~chosen], none.coefficients[~chosen])


def test_without_a_predictor_a_row_is_the_corrected_state():
    program, whole = unipc(STEPS, predictor=False, clip=None), unipc(STEPS, clip=None)
    for name in ("x", "m", "0", *(f"h{k}" for k in range(program.num_slots))):
        np.testing.assert_array_equal(program.column(f"c_{name}"), whole.column(f"g0_{name}"))
    np.testing.assert_array_equal(program.column("g0_m"), whole.column("g0_m"))


@pytest.mark.parametrize("k", range(6))
def test_phi(k):
    """Beside the integral φ_k(z) = ∫ e^{(1−u)z}·u^{k−1}/(k−1)! du over [0, 1]."""
    z = np.array([-30.0, -3, -1.0001, -0.9999, -1e-3, -1e-9, 0, 1e-5, 0.5, 0.99999, 1.00001, 4, 20])
    if k == 0:
        expected = np.exp(z)
    else:
        nodes, weights = np.polynomial.legendre.leggauss(60)
        u = (nodes + 1) / 2
        expected = np.array([(weights / 2 * np.exp((1 - u) * w) * u ** (k - 1)).sum() for w in z])
        expected /= np.prod(np.arange(1, k)) if k > 1 else 1
    np.testing.assert_allclose(phi(k, z), expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dpm_multistep(STEPS, algorithm="dpm"), "algorithm is 'dpm'; it may be one of 'dpmsolver\\+\\+'"),
        (lambda: dpm_multistep(STEPS, solver_type="rk"), "solver_type is 'rk'"),
        (lambda: dpm_multistep(STEPS, third="fourth"), "third is 'fourth'"),
        (lambda: dpm_multistep(STEPS, orders=4), "orders are 4; they must be from 1 to 3"),
        (lambda: dpm_multistep(STEPS, orders=0), "orders are 0"),
        (lambda: dpm_multistep(STEPS, orders=1.5), "orders are 1.5"),
        (lambda: dpm_multistep(STEPS, orders=[1, 2]), "of shape \\(7,\\)"),
        (lambda: dpm_multistep(STEPS, orders=3, history=1), "history is 1"),
        (lambda: unipc(STEPS, variant="bh3"), "variant is 'bh3'; it may be one of 'bh1', 'bh2'"),
        (lambda: unipc(STEPS, corrector=[1, 2]), "corrector is"),
        (lambda: unipc(STEPS, corrector=2), "corrector is 2"),
        (lambda: unipc(STEPS, corrector=[-1] * 7), "orders must be 0, for none, or more"),
    ],
)
def test_what_they_do_not_take(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_epsilon_algorithms_cannot_do():
    from_noise = chain([0.0, 0.5], [1.0, 0.8], [0], "v")
    to_data = chain([0.5, 1.0], [0.8, 0.0], [0], "v")
    with pytest.raises(ValueError, match="cannot start from alpha = 0"):
        dpm_multistep(from_noise, algorithm="dpmsolver")
    with pytest.raises(ValueError, match="starts from alpha = 0"):
        unipc(from_noise, predict_x0=False)
    with pytest.raises(ValueError, match="end above it"):
        dpm_multistep(to_data, algorithm="sde-dpmsolver")
