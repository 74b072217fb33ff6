import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkern.process import GaussianProcess, cosine_betas, linear_betas
from diffkern.solvers import SOLVERS, build
from tests.solvers.executor import execute, new_slots

PREDICTIONS = ["eps", "x0", "v", "x_prev", "flow"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
NOISY = ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"]
# Those with several rows a step have tests of their own.
ONE_ROW = [name for name in SOLVERS if name not in ("plms", "pndm", "heun")]
DETERMINISTIC = [name for name in ONE_ROW if name not in NOISY]


def states(process, seed=0):
    """x0 (within ±1), eps and, for each t of the process, x_t."""
    rng = np.random.default_rng(seed)
    x0, eps = rng.uniform(-1, 1, (1, 2, 3)), rng.standard_normal((1, 2, 3))
    s, sigma = (
        process.sqrt_alphas_cumprod[:, None, None, None],
        process.sqrt_one_minus_alphas_cumprod[:, None, None, None],
    )
    return x0, eps, s * x0 + sigma * eps


def output_of(process, x0, eps, t):
    s, sigma = process.sqrt_alphas_cumprod[t], process.sqrt_one_minus_alphas_cumprod[t]
    coef1, coef2 = process.posterior_mean_coef1[t], process.posterior_mean_coef2[t]
    return {
        "x0": x0,
        "eps": eps,
        "v": s * eps - sigma * x0,
        "x_prev": coef1 * x0 + coef2 * (s * x0 + sigma * eps),
        "flow": eps - x0,
    }[process.prediction]


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_with_a_perfect_network_they_walk_along_the_marginal(solver, prediction, clip):
    """x_{t−1} = √ᾱ_{t−1}·x0 + √(1−ᾱ_{t−1})·ε with the same ε, and x0 itself at the end."""
    process = GaussianProcess(cosine_betas(1000), prediction).respace(20)
    x0, eps, x = states(process)
    program = build(solver, process, clip=clip)
    slots = new_slots(program, x0)
    for t in reversed(range(20)):
        step = execute(program, 19 - t, x[t], output_of(process, x0, eps, t), np.full_like(x0, 1e9), slots)
        np.testing.assert_allclose(step.x, x[t - 1] if t else x0, atol=1e-10)
        np.testing.assert_allclose(step.x0, x0, atol=1e-7)


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", ["ddpm", "ddim with eta 1"])
def test_ancestral_steps_with_a_perfect_network_sample_the_posterior(solver, prediction, clip):
    process = GaussianProcess(linear_betas(1000), prediction).respace(20)
    x0, eps, x = states(process)
    noise = np.random.default_rng(1).standard_normal(x0.shape)
    program = build(solver[:4], process, clip=clip, eta=1.0 if "eta" in solver else 0.0)
    for t in reversed(range(20)):
        mean, variance, _ = process.q_posterior_mean_variance(x0, x[t], [t])
        step = execute(program, 19 - t, x[t], output_of(process, x0, eps, t), noise)
        np.testing.assert_allclose(step.mean, mean, atol=1e-10)
        np.testing.assert_allclose(step.x, mean + np.sqrt(variance) * noise, atol=1e-10)


@given(
    st.sampled_from(PREDICTIONS),
    st.sampled_from(VARIANCES),
    st.floats(0, 1),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
)
def test_folding_changes_nothing(prediction, variance, eta, steps, seed):
    """A clip so wide that it never acts, which keeps x0 apart, gives what the folded program gives."""
    process = GaussianProcess(cosine_betas(100), prediction, variance)
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((2, 1, 2, 3))
    output = rng.standard_normal((1, 4 if variance.startswith("learned") else 2, 3))
    row = int(rng.integers(steps))
    for solver in ONE_ROW:
        results = []
        for clip in (None, (-1e9, 1e9)):
            program = build(solver, process, steps, clip=clip, eta=eta * (solver == "ddim"))
            slots = np.full((program.num_slots, *x.shape), 0.3)
            results.append((execute(program, row, x, output, noise, slots).x, slots))
        for folded, apart in zip(*results, strict=True):
            np.testing.assert_allclose(folded, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ONE_ROW)
@pytest.mark.parametrize("variance", VARIANCES)
def test_times_variance_and_the_last_row(solver, variance):
    process = GaussianProcess(linear_betas(1000), variance=variance)
    program = build(solver, process, 10)
    assert program.times.tolist() == process.respace(10).timestep_map[::-1].tolist()
    assert program.num_rows == 10
    assert program.calls_network.all()
    assert program.column("c_z")[-1] == 0
    if solver != "lms":  # which extrapolates to σ = 0; the last step of the others returns x0
        assert program.column("c_x")[-1] == 0
        assert program.column("c_0")[-1] == pytest.approx(1, abs=1e-12)
    assert program.makes_noise == (solver in NOISY)
    if solver == "ddpm":
        assert program.variance == process.channel_variance
    else:  # bounds of 0: whatever the further channels say, σ is 1
        assert program.variance == ("learned_range" if variance.startswith("learned") else "fixed")
    assert program.clip == (-1, 1)


def test_ddpm_variances():
    process = GaussianProcess(linear_betas(1000), variance="fixed_large").respace(10)
    np.testing.assert_allclose(build("ddpm", process).column("c_z")[:-1] ** 2, process.betas[:0:-1])
    own = build("ddpm", GaussianProcess(process.betas, variance="learned"))
    assert own.column("c_z").tolist() == [1] * 9 + [0]
    x, output, noise = (np.random.default_rng(i).standard_normal((1, c, 3)) for i, c in enumerate((2, 4, 2)))
    step = execute(own, 3, x, output, noise)
    np.testing.assert_allclose(step.x - step.mean, np.exp(output[:, 2:] / 2) * noise)
    learned = build("ddpm", GaussianProcess(process.betas, variance="learned_range"))
    assert learned.column("c_z").tolist() == [1] * 9 + [0]
    np.testing.assert_allclose(np.exp(learned.column("log_var_max")), process.betas[::-1])
    np.testing.assert_allclose(np.exp(learned.column("log_var_min"))[:-1], process.posterior_variance[:0:-1])


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 1.0), *((name, 0.0) for name in DETERMINISTIC)])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_is_ignored(variance, solver, eta):
    process = GaussianProcess(linear_betas(100), variance=variance)
    x, output, noise = (np.random.default_rng(i).standard_normal((1, c, 3)) for i, c in enumerate((2, 4, 2)))
    program, plain = build(solver, process, eta=eta), build(solver, GaussianProcess(process.betas), eta=eta)
    slots, plain_slots = new_slots(program, x), new_slots(plain, x)
    for row in range(100):
        with_variance = execute(program, row, x, output, noise, slots).x
        np.testing.assert_array_equal(with_variance, execute(plain, row, x, output[:, :2], noise, plain_slots).x)


@pytest.mark.parametrize("solver", ONE_ROW)
@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_beta_of_0_2_over_1000_steps(solver, clip, prediction):
    """ᾱ_T is 2e−47, below float32: the run is finite, and a perfect network still leads to x0."""
    process = GaussianProcess(linear_betas(1000, 1e-4, 0.2), prediction)
    program = build(solver, process, clip=clip)
    x0, eps, x = states(process)
    state, slots = x[-1], new_slots(program, x0)
    for row in range(1000):
        t = 999 - row
        eps_now = (state - process.sqrt_alphas_cumprod[t] * x0) / process.sqrt_one_minus_alphas_cumprod[t]
        state = execute(program, row, state, output_of(process, x0, eps_now, t), eps, slots).x
        assert np.isfinite(state).all()
    np.testing.assert_allclose(state, x0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_terminal_snr(solver):
    """A last β of 1: x0 and v predictions work, eps is refused with the reason."""
    betas = linear_betas(20)
    assert betas[-1] == 1
    if solver in ("pndm", "dpm_solver_2m", "dpm_solver_3m"):
        with pytest.raises(ValueError, match=r"steps|alpha"):  # the reason: no step of theirs begins there
            build(solver, GaussianProcess(betas, "v"))
        return
    for prediction in ("x0", "v"):
        assert np.isfinite(build(solver, GaussianProcess(betas, prediction)).coefficients).all()
    with pytest.raises(ValueError, match=r"prediction is 'eps', but alphas_cumprod\[19\] is 0.0"):
        build(solver, GaussianProcess(betas))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in NOISY])
def test_with_a_perfect_network_they_all_come_to_x0(solver, prediction):
    """The network knows x0, and says of each state the ε that is in it; rows of several a step too."""
    process = GaussianProcess(linear_betas(1000), prediction)
    program = build(solver, process, 8, clip=None)
    x0, eps, x = states(process)
    state, slots = x[-1], new_slots(program, x0)
    for row, t in enumerate(program.times.astype(int)):
        state = execute(program, row, state, output_of(process, x0, eps, t), None, slots).x
    np.testing.assert_allclose(state, x0, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "options", "name"),
    [
        ("euler", {"s_churn": 10.0, "s_min": 0.1, "s_max": 50.0, "s_noise": 1.01}, "s_churn"),
        ("heun", {"s_churn": 10.0}, "s_churn"),
        ("euler_ancestral", {"eta": 0.3}, "eta"),
        ("unipc", {"order": 3}, "order"),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, "solver_type"),
        ("deis", {"order": 1}, "order"),
    ],
)
def test_options_reach_the_solver(solver, options, name):
    process = GaussianProcess(linear_betas(1000))
    with_them, without = build(solver, process, 8, **options), build(solver, process, 8)
    same = with_them.coefficients.shape == without.coefficients.shape
    assert not (same and np.array_equal(with_them.coefficients, without.coefficients))
    with pytest.raises(ValueError, match=f"{name} is .*; the solver 'ddpm' takes none"):
        build("ddpm", process, 8, **{name: options[name]})


def test_churn_before_the_first_step_calls_no_network():
    program = build("euler", GaussianProcess(linear_betas(1000)), 8, s_churn=10.0)
    assert program.calls_network.tolist() == [False] + [True] * 8


@pytest.mark.parametrize("solver", ONE_ROW)
def test_one_step(solver):
    program = build(solver, GaussianProcess(linear_betas(1000), "x0"), 1)
    x, output, noise = (np.full((1, 1, 2), value) for value in (3.0, 0.5, 9.0))
    step = execute(program, 0, x, output, noise, new_slots(program, x))
    np.testing.assert_array_equal(step.x, step.x0)
    np.testing.assert_array_equal(step.x, 0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "dpm"}, f"solver is 'dpm'; it may be one of {', '.join(map(repr, SOLVERS))}"),
        ({"name": "ddpm", "eta": 0.5}, "eta is 0.5; the solver 'ddpm' takes none"),
        ({"name": "dpmpp_2m", "eta": 0.5}, "eta is 0.5; the solver 'dpmpp_2m' takes none"),
        ({"eta": 1.5}, r"eta is 1.5; it must be in \[0, 1\]"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"steps": 101}, r"steps is 101; it must be in \[1, 100\]"),
        ({"steps": [60, 40]}, "steps asks for 60 steps of section 0, which has 50"),
        ({"clip": (1, 1)}, "clip is"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**{"name": "ddim", "process": GaussianProcess(linear_betas(100)), **kwargs})
