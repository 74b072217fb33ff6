"""The schedule with weights: rising whatever they are, exact at its ends, and tables that every solver takes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkern.sampling import Sampler
from diffkern.solvers import SOLVERS
from diffkern.training import LearnedLogSNR

U = torch.linspace(0, 1, 1001, dtype=torch.float64)
INTERIOR = ("sharpness", "shift", "height")


def with_weights(seed: int, spread: float, ends: float | None = None, **arguments) -> LearnedLogSNR:
    """A schedule whose every weight is off by a normal number times `spread`, those of its ends times `ends`."""
    schedule = LearnedLogSNR(**arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in schedule.named_parameters():
            factor = spread if ends is None or name in INTERIOR else ends
            weight += factor * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
    return schedule


@pytest.mark.parametrize(("gamma_0", "gamma_1"), [(-13.3, 5.0), (-7.7, 9.0), (-1.0, 0.5)])
def test_it_starts_as_a_straight_line(gamma_0, gamma_1):
    gamma = LearnedLogSNR(gamma_0, gamma_1)(U)
    line = gamma_0 + (gamma_1 - gamma_0) * U
    assert (gamma - line).abs().max() < 1e-4 * (gamma_1 - gamma_0)


@given(seed=st.integers(0, 2**32), spread=st.floats(0, 300))
@settings(max_examples=60, deadline=None)
def test_it_rises_strictly_between_its_ends_whatever_the_weights(seed, spread):
    schedule = with_weights(seed, spread)
    gamma, (first, last) = schedule(U), schedule.ends()
    assert first < last
    assert gamma[0] == first
    assert gamma[-1] == last
    assert (gamma.diff() > 0).all()
    assert (schedule.slope(U) > 0).all()


@pytest.mark.parametrize("value", [-1e6, 1e6])
def test_ends_keep_their_order_at_extreme_weights(value):
    schedule = LearnedLogSNR()
    with torch.no_grad():
        schedule.below.fill_(value)
        schedule.above.fill_(-1e6)
    first, last = schedule.ends()
    assert first + 1 <= last < 100


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_its_slope_is_its_derivative(spread):
    schedule = with_weights(3, spread)
    u = U.clone().requires_grad_()
    (exact,) = torch.autograd.grad(schedule(u).sum(), u)
    torch.testing.assert_close(schedule.slope(U), exact, rtol=1e-12, atol=1e-12)
    h = 1e-5
    differences = (schedule(U[1:-1] + h) - schedule(U[1:-1] - h)) / (2 * h)
    torch.testing.assert_close(schedule.slope(U[1:-1]), differences, rtol=1e-5, atol=1e-7)


def test_ends_and_interior_have_parameters_of_their_own():
    schedule = LearnedLogSNR()
    names = dict(schedule.named_parameters())
    assert set(names) == {"below", "above", *INTERIOR}
    sum(schedule.ends()).backward()
    assert all(names[name].grad is None for name in INTERIOR)
    schedule.zero_grad()
    sum(part.sum() for part in schedule.rise(U)).backward()
    assert names["below"].grad is None
    assert names["above"].grad is None
    assert all(names[name].grad.abs().max() > 0 for name in INTERIOR)


def test_time_is_affine_and_stays_when_the_ends_move():
    schedule = LearnedLogSNR(-8.0, 5.0)
    gamma = torch.tensor([-8.0, -1.5, 5.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 499.5, 999.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(gamma), expected)
    moved = with_weights(1, 1.0, gamma_0=-8.0, gamma_1=5.0)
    torch.testing.assert_close(moved.time(gamma), expected)
    assert set(schedule.state_dict()) >= {"time_zero", "time_per_gamma", "middle"}


@pytest.mark.parametrize("spread", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("num_timesteps", [2, 10, 100, 1000, 4000])
def test_tables_are_the_schedule_at_even_u(num_timesteps, spread):
    schedule = with_weights(7, spread, ends=1.0)
    process = schedule.process(num_timesteps, "v", "fixed_large")
    assert (process.prediction, process.variance) == ("v", "fixed_large")
    gamma = schedule(torch.linspace(0, 1, num_timesteps, dtype=torch.float64)).detach()
    np.testing.assert_allclose(process.alphas_cumprod, torch.sigmoid(-gamma).numpy(), rtol=1e-11)
    np.testing.assert_allclose(process.timestep_map, schedule.time(gamma).numpy(), rtol=1e-12, atol=1e-9)
    assert process.timestep_map.dtype == np.float64
    assert ((process.betas > 0) & (process.betas < 1)).all()
    # β̃ depends on differences of ᾱ alone where the schedule is flat.
    step = -np.expm1(-np.diff(gamma.numpy()))
    exact = torch.sigmoid(gamma).numpy()[:-1] * step
    wide = step > 1e-9
    np.testing.assert_allclose(process.posterior_variance[1:][wide], exact[wide], rtol=1e-4)


@pytest.mark.parametrize("num_timesteps", [10, 100, 1000, 4000])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_on_the_tables(solver, num_timesteps):
    process = with_weights(2, 0.5).process(num_timesteps)
    seen = []

    def model(x, t):
        seen.append(t)
        return 0.5 * torch.tanh(x)

    images = Sampler(model, process, shape=(1, 4, 4), solver=solver, steps=5).sample(2, seed=1)
    assert torch.isfinite(images).all()
    times = torch.cat(seen).double().numpy()
    assert times.min() >= process.timestep_map[0] - 1e-3
    assert times.max() <= process.timestep_map[-1] + 1e-3
    assert (times != times.round()).any()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"gamma_0": 5.0, "gamma_1": 5.5}, "gamma_1"),
        ({"gamma_0": 5.0, "gamma_1": -5.0}, "gamma_1"),
        ({"gamma_0": float("nan")}, "gamma_0"),
        ({"gamma_1": float("inf")}, "gamma_1"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        LearnedLogSNR(**arguments)
    with pytest.raises(ValueError, match="num_timesteps is 1"):
        LearnedLogSNR().process(1)
