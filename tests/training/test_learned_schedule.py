"""The continuous-time bound against quadrature on a Gaussian problem that has an exact denoiser, and its gradients."""

import math

import pytest
import torch
from torch import nn

from diffkern.ops import philox_normal, vb_terms
from diffkern.training import LearnedSchedule
from diffkern.training.learned_schedule import ContinuousLoss

TAU = 0.2  # standard deviation of the data: nearly none of it reaches the end bins
LEVELS = 17
INTERIOR = ("sharpness", "shift", "height")


class Exact(nn.Module):
    """E[target | x_t] of data N(0, tau²) that is told the schedule's time; `gain` 1 is a trainable factor."""

    def __init__(self, schedule, prediction, tau=TAU):
        super().__init__()
        self.prediction, self.tau = prediction, tau
        self.zero, self.per_gamma = schedule.time_zero.clone(), schedule.time_per_gamma.clone()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x_t, t):
        gamma = (t.double() / self.per_gamma + self.zero).reshape(-1, 1, 1, 1)
        signal, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        whole = signal**2 * self.tau**2 + sigma**2
        x0, eps = signal * self.tau**2 / whole * x_t, sigma / whole * x_t
        value = {"eps": eps, "x0": x0, "v": signal * eps - sigma * x0, "flow": eps - x0}[self.prediction]
        return self.gain * value.to(x_t.dtype)


def problem(prediction="eps", count=256, *, dtype=torch.float64, size=32, **description):
    torch.manual_seed(0)
    described = LearnedSchedule(prediction=prediction, gamma_0=-7.0, gamma_1=3.0, **description)
    schedule = described.build()
    drawn = {"seed": 5, "null_label": None, "label_dropout": 0}
    loss = ContinuousLoss(schedule, described, levels=LEVELS, batch_size=count, **drawn)
    x0 = TAU * torch.randn(count, 1, size, size, dtype=dtype)
    return schedule, loss, Exact(schedule, prediction), x0


def terms(loss, model, x0, draw=0):
    return loss.terms(model, x0, torch.zeros(len(x0)), draw, torch.arange(len(x0)))


def bend(schedule, spread=0.7):
    with torch.no_grad():
        for name in INTERIOR:
            weight = getattr(schedule, name)
            weight += spread * torch.randn(weight.shape, dtype=weight.dtype)


def exact_bound(schedule, num_timesteps):
    """The three terms' expectations in bits/dim, by quadrature in float64; differentiable in the ends."""
    first, last = schedule.ends()
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    gamma = first + (last - first) * u
    # Var[ε | x_t] = τ²/(τ² + e^γ), integrated over γ.
    diffusion = torch.trapezoid(0.5 * TAU**2 / (TAU**2 + torch.exp(gamma)), u) * (last - first)
    alpha = torch.sigmoid(-last)
    prior = 0.5 * (alpha * TAU**2 - alpha - torch.log(1 - alpha))
    # x0 − x̂0 at γ_0 is normal with the posterior's variance; the decoder's is β̃_1.
    error = (TAU**2 / (1 + TAU**2 * torch.exp(-first))).sqrt()
    step = schedule.rise(torch.tensor(1 / (num_timesteps - 1), dtype=torch.float64)).height.detach()
    beta = torch.sigmoid(first) * -torch.expm1((first - last) * step)
    z = torch.linspace(-9, 9, 40001, dtype=torch.float64)
    upper, lower = ((error * z + side / (LEVELS - 1)) / beta.sqrt() for side in (1, -1))
    # Φ(upper) − Φ(lower) on the side where both are small.
    over = upper + lower > 0
    b, a = (torch.special.log_ndtr(torch.where(over, -x, y)) for x, y in ((lower, upper), (upper, lower)))
    log_p = b + torch.log(-torch.expm1(a - b))
    decoder = -torch.trapezoid(log_p * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi), z)
    return [value / math.log(2) for value in (diffusion, prior, decoder)]


def estimates(loss, model, x0, parameters, draws=8):
    """Mean and standard error over draws of (diffusion, prior, decoder) and of their gradients by `parameters`."""
    rows = []
    for draw in range(draws):
        found = terms(loss, model, x0, draw)
        values = [found.diffusion.mean(), found.prior.mean(), (found.decoder * found.decoder_weight).sum()]
        row = list(values)
        for value in values:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            row += [torch.zeros(()) if gradient is None else gradient for gradient in gradients]
        rows.append(torch.stack([entry.double() for entry in row]).detach())
    table = torch.stack(rows)
    return table.mean(0), table.std(0) / draws**0.5


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_bound_and_gradient_of_the_ends_are_those_of_quadrature(prediction, bent):
    """Also with another interior, on which the continuous bound does not depend."""
    num_timesteps = 40
    schedule, loss, model, x0 = problem(prediction, num_timesteps=num_timesteps)
    if bent:
        bend(schedule)
    ends = [schedule.below, schedule.above]
    expected = exact_bound(schedule, num_timesteps)
    row = list(expected)
    for value in expected:
        gradients = torch.autograd.grad(value, ends, retain_graph=True, allow_unused=True)
        row += [torch.zeros(()) if gradient is None else gradient for gradient in gradients]
    expected = torch.stack([entry.double() for entry in row]).detach()
    mean, error = estimates(loss, model, x0, ends)
    # The data are the same in every draw, so their own deviation, some 0.2 % of τ², is no part of the error.
    assert ((mean - expected).abs() <= 5 * error + 0.01 * expected.abs() + 1e-6).all(), (mean, expected, error)
    assert (error <= 0.03 * expected.abs() + 2e-3).all(), (error, expected)


def test_the_decoder_is_that_of_the_tables_timestep_zero():
    """What `vb_terms` says of the discrete process at t = 0, for the same noise."""
    for variance in ("fixed_small", "fixed_large"):
        schedule, loss, model, x0 = problem(num_timesteps=50, variance=variance, size=4)
        bend(schedule)
        process = schedule.process(50, "eps", variance)
        found = terms(loss, model, x0)
        chosen = x0[::8]
        eps = philox_normal(chosen.shape, 5, draw=0, samples=torch.arange(0, len(x0), 8), stream=3).double()
        x_t = process.sqrt_alphas_cumprod[0] * chosen + process.sqrt_one_minus_alphas_cumprod[0] * eps
        output = model(x_t, torch.full((len(chosen),), process.timestep_map[0], dtype=torch.float64))
        t = torch.zeros(len(chosen), dtype=torch.int64)
        expected = vb_terms(
            output, chosen, t, process.tables("cpu"), target="eps", levels=LEVELS, decoder="exact", noise=eps
        ).vb
        torch.testing.assert_close(found.decoder, expected, rtol=1e-5, atol=1e-7)


def test_the_bound_is_the_limit_of_the_discrete_one():
    """The terms of a process of 2,000 steps, with the exact denoiser, sum to the estimate."""
    schedule, _, model, x0 = problem(count=64)
    with torch.no_grad():
        process = schedule.process(2000)
        tables, total = process.tables("cpu"), 0.0
        for t in range(3, 2000, 10):
            index = torch.full((len(x0),), t)
            eps = philox_normal(x0.shape, 5, draw=t, stream=3).double()
            x_t = process.sqrt_alphas_cumprod[t] * x0 + process.sqrt_one_minus_alphas_cumprod[t] * eps
            output = model(x_t, torch.full((len(x0),), process.timestep_map[t], dtype=torch.float64))
            terms_t = vb_terms(output, x0, index, tables, target="eps", levels=LEVELS, noise=eps)
            total += 10 * terms_t.vb.mean().item()
        expected = exact_bound(schedule, 2000)[0].item()
    assert total == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_the_interior_descends_the_mean_square_of_the_losses_and_the_rest_the_bound(prediction, monkeypatch):
    """One backward pass against brute force: ordinary gradients of both, one after the other."""
    schedule, loss, model, x0 = problem(prediction, count=16, size=4)
    bend(schedule)
    named = dict(schedule.named_parameters()) | {"gain": model.gain}
    loss(model, x0, torch.zeros(16), 3, torch.arange(16)).backward()
    found = {name: parameter.grad.clone() for name, parameter in named.items()}

    monkeypatch.setattr(ContinuousLoss, "_descend_variance", lambda *_: None)
    plain = terms(loss, model, x0, draw=3)
    interior = [named[name] for name in INTERIOR]
    squares = torch.autograd.grad(plain.diffusion.square().mean(), interior, retain_graph=True)
    others = [name for name in named if name not in INTERIOR]
    bound = torch.autograd.grad(plain.mean(), [named[name] for name in others])
    for name, expected in [*zip(INTERIOR, squares, strict=True), *zip(others, bound, strict=True)]:
        torch.testing.assert_close(
            found[name], expected, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_gradients_of_the_ends_are_those_of_differences_for_a_network_that_is_wrong(prediction):
    """For the best network what it is told has no effect of first order; here every path to the ends counts."""
    schedule, loss, _, x0 = problem(prediction, count=16, size=4)
    bend(schedule)
    model = Exact(schedule, prediction, tau=0.5)
    terms(loss, model, x0, draw=3).mean().backward()
    for end in (schedule.below, schedule.above):
        found, start, values = end.grad.item(), end.item(), []
        for change in (-1e-5, 1e-5):
            with torch.no_grad():
                end.fill_(start + change)
                values.append(terms(loss, model, x0, draw=3).mean().item())
                end.fill_(start)
        assert found == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-6, abs=1e-8)


def test_training_the_interior_makes_the_loss_even_and_leaves_its_mean():
    schedule, loss, model, x0 = problem(count=128, size=16)

    def spread():
        found = terms(loss, model, x0, draw=1000).diffusion.detach()
        return found.mean().item(), found.std().item()

    mean_before, std_before = spread()
    schedule.requires_grad_(False)
    interior = [getattr(schedule, name).requires_grad_() for name in INTERIOR]
    optimizer = torch.optim.Adam(interior, lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        loss(model, x0, torch.zeros(128), step, torch.arange(128)).backward()
        optimizer.step()
    mean_after, std_after = spread()
    assert std_after < 0.4 * std_before
    assert mean_after == pytest.approx(mean_before, rel=0.02)
    u = torch.linspace(0, 1, 500, dtype=torch.float64)
    assert (schedule(u).diff() > 0).all()


def test_times_are_stratified_over_the_global_batch_whatever_the_split():
    _, loss, _, _ = problem(count=24, size=4)
    seen = []
    for draw in range(40):
        draw = torch.tensor(draw)
        u = loss._times(draw, torch.arange(24))
        parts = torch.cat([loss._times(draw, torch.arange(first, first + 8)) for first in (0, 8, 16)])
        assert torch.equal(u, parts)
        assert ((u >= 0) & (u < 1)).all()
        torch.testing.assert_close(u.sort().values.diff(), torch.full((23,), 1 / 24, dtype=torch.float64))
        seen.append(u.min() * 24)
    seen = torch.stack(seen)
    assert 0 <= seen.min() < 0.15
    assert 0.85 < seen.max() < 1


@pytest.mark.parametrize("size", [1, 5, 8, 12, 24])
def test_the_bound_does_not_depend_on_how_the_batch_is_split(size):
    _, loss, model, x0 = problem(count=24, size=4)
    whole = loss(model, x0, torch.zeros(24), 2, torch.arange(24))
    sums = 0.0
    for first in range(0, 24, size):
        part = x0[first : first + size]
        samples = torch.arange(first, first + len(part))
        sums += loss(model, part, torch.zeros(len(part)), 2, samples) * len(part) / 24
    torch.testing.assert_close(sums, whole)


def test_labels_are_dropped_at_all_levels_alike():
    described = LearnedSchedule()
    loss = ContinuousLoss(
        described.build(), described, levels=LEVELS, batch_size=400, seed=5, null_label=3, label_dropout=0.25
    )
    seen = []

    def model(x, t, y):
        seen.append(y)
        return 0 * x

    labels = torch.arange(400) % 3
    loss(model, torch.zeros(400, 1, 2, 2), labels, 0, torch.arange(400))
    (given,) = seen
    assert torch.equal(given[400:], given[:400:8])
    dropped = given[:400] == 3
    assert 0.15 < dropped.float().mean() < 0.35
    assert torch.equal(given[:400][~dropped], labels[~dropped])


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_timesteps", 1), ("prediction", "x_prev"), ("variance", "learned_range"), ("lr_scale", -1.0)],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        LearnedSchedule(**{field: value})


def test_the_first_schedule_follows_the_grey_levels():
    first, last = LearnedSchedule().build(256).ends()
    assert first.item() == pytest.approx(-13.28, abs=0.01)
    assert last.item() == pytest.approx(5.0)
    assert math.exp(LearnedSchedule().build(17).ends()[0].item() / 2) == pytest.approx(1 / 16 / 3)


def test_a_network_of_another_shape_is_an_error():
    _, loss, _, x0 = problem(count=8, size=4)
    with pytest.raises(ValueError, match="the model's output"):
        loss(lambda x, t: torch.cat([x, x], 1), x0, torch.zeros(8), 0, torch.arange(8))
