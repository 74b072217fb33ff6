"""Values that broke other group norms: a large mean, constant groups, the ends of the formats, NaN and Inf."""

from __future__ import annotations

import pytest
import torch

from diffkern.ops import group_norm
from tests.ops import oracles
from tests.ops.cases import STORAGE, assert_as_good_as_eager, error, in_layout, randn, same_bits

PLAIN = (None, None, 1e-5, None, None, False)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@layouts
@pytest.mark.parametrize("mean", [1e3, -1e4, 1e6])
def test_large_mean(backend, layout, mean):
    """Σx² − μ² would leave nothing of a variance of 1. At 1e6 float32 itself knows x to 1/16 only."""
    for shape, groups in [((2, 32, 16, 16), 8), ((1, 3, 100, 90), 1), ((4, 64, 3, 3), 32)]:
        x = in_layout((randn(*shape, dtype=torch.float64) + mean).float(), layout)
        y, exact = group_norm(x, groups), oracles.group_norm(x, groups, *PLAIN)
        assert_as_good_as_eager(y, exact, oracles.eager_group_norm(x, groups, *PLAIN), (shape, mean))
        assert error(y, exact) < 1e-6 + abs(mean) * 2**-24  # less than the spacing of x's own values


@layouts
def test_large_mean_gradients(backend, layout):
    x = in_layout((randn(2, 32, 16, 16, dtype=torch.float64) + 1e3).float(), layout).requires_grad_()
    dy = randn(2, 32, 16, 16, seed=1)
    gradient = torch.autograd.grad(group_norm(x, 8), x, dy)[0]
    exact = torch.autograd.grad(oracles.group_norm(x, 8, *PLAIN), x, dy.double())[0]
    eager = torch.autograd.grad(oracles.eager_group_norm(x, 8, *PLAIN), x, dy)[0]
    assert_as_good_as_eager(gradient, exact, eager, "dx at mean 1e3")


@layouts
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e3, 65504.0, 1e-40])
@pytest.mark.parametrize("dtype", STORAGE)
def test_constant_input_gives_the_bias(backend, layout, value, dtype):
    """Variance 0: the normalised value is 0 up to the rounding of the mean, and the gradient is finite."""
    bias = randn(6, seed=1)
    for shape in [(2, 6, 7, 7), (1, 6, 1, 1), (1, 6, 61, 67)]:
        x = in_layout(torch.full(shape, value, dtype=dtype), layout).requires_grad_()
        y = group_norm(x, 3, randn(6), bias.to(dtype) if dtype == torch.float32 else bias)
        rounding = torch.finfo(dtype).eps * 2 + 1e-5
        assert error(y, bias.reshape(1, 6, 1, 1).expand(shape)) <= rounding
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        assert bool(gradient.isfinite().all())


@layouts
def test_constant_sample_beside_others(backend, layout):
    x = randn(3, 8, 9, 9)
    x[1] = 5.0
    y = group_norm(in_layout(x, layout), 2)
    assert error(y[1], torch.zeros(8, 9, 9)) == 0
    assert error(y, oracles.group_norm(x, 2, *PLAIN)) < 1e-6


@layouts
@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e6, 1e15])
def test_magnitudes_of_float32(backend, layout, magnitude):
    x = in_layout(randn(2, 8, 9, 9) * magnitude, layout)
    for eps in (1e-5, 0.0):
        options = (None, None, eps, None, None, True)
        y = group_norm(x, 2, eps=eps, activation="silu")
        exact, eager = oracles.group_norm(x, 2, *options), oracles.eager_group_norm(x, 2, *options)
        assert_as_good_as_eager(y, exact, eager, (magnitude, eps))


@layouts
def test_float16_near_its_end(backend, layout):
    """Sums and squares of values near 6e4 pass float16's range; statistics do not care."""
    x = in_layout((6e4 + 3e3 * randn(2, 8, 16, 16)).clamp(max=65504).half(), layout)
    options = (None, None, 1e-5, None, None, True)
    y = group_norm(x, 4, activation="silu")
    exact = oracles.group_norm(x, 4, *options)
    assert_as_good_as_eager(y, exact, exact.half(), "float16 near 6e4")


@layouts
def test_float16_subnormals(backend, layout):
    x = in_layout((randn(1, 4, 8, 8) * 3e-6).half(), layout)
    y = group_norm(x, 2, eps=1e-14)
    assert error(y, oracles.group_norm(x, 2, None, None, 1e-14, None, None, False)) < 1e-3


@layouts
def test_silu_far_out(backend, layout):
    """Where exp over- or underflows: y is z above and 0 below, and so are the slopes."""
    bias = torch.tensor([-1e4, -200.0, -89.0, -87.0, -30.0, 30.0, 87.0, 89.0, 200.0, 1e4])
    x = in_layout(randn(2, 10, 5, 5), layout).requires_grad_()
    weight = torch.full((10,), 1e-3)
    y = group_norm(x, 10, weight, bias, activation="silu")
    exact = oracles.group_norm(x, 10, weight, bias, 1e-5, None, None, True)
    assert bool(((y - exact).abs() <= 4e-6 * exact.abs() + 1e-30).all())
    dy = randn(2, 10, 5, 5, seed=1)
    (gradient,) = torch.autograd.grad(y, x, dy)
    (exact_gradient,) = torch.autograd.grad(exact, x, dy.double())
    assert error(gradient, exact_gradient) < 1e-4


@layouts
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", STORAGE)
def test_nan_and_inf_stay_in_their_sample(backend, layout, bad, silu, dtype):
    """In y and in dx; in the sample itself every value of the group is NaN, as with F.group_norm."""
    activation = "silu" if silu else None
    for shape in [(4, 6, 5, 7), (3, 4, 70, 60)]:
        clean = in_layout(randn(*shape).to(dtype), layout)
        spoilt = clean.clone()
        spoilt[1, -1, 3, 3] = bad
        weight, dy = randn(shape[1], seed=1).to(dtype), randn(*shape, seed=2).to(dtype)
        results = []
        for x in (clean, spoilt):
            x = x.requires_grad_()
            y = group_norm(x, 2, weight, activation=activation)
            results.append((y.detach(), torch.autograd.grad(y, x, dy)[0]))
        others = [n for n in range(shape[0]) if n != 1]
        half = shape[1] // 2
        for before, after in zip(*results, strict=True):
            assert same_bits(after[others], before[others])
            assert same_bits(after[1, :half], before[1, :half])
            assert bool(after[1, half:].isnan().all())


@layouts
def test_nan_in_one_dy_stays_in_its_sample(backend, layout):
    x = in_layout(randn(3, 6, 5, 7), layout).requires_grad_()
    dy = randn(3, 6, 5, 7, seed=1)
    before = torch.autograd.grad(group_norm(x, 2), x, dy)[0]
    dy[2, 0, 0, 0] = torch.nan
    after = torch.autograd.grad(group_norm(x, 2), x, dy)[0]
    assert same_bits(after[:2], before[:2])
    assert bool(after[2, :3].isnan().all())
