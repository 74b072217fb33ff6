"""Where squares over- or underflow, pixels of zeros, and values that are not finite."""

from __future__ import annotations

import pytest
import torch

from diffkern.ops import channel_rms_norm
from tests.ops import oracles
from tests.ops.cases import STORAGE, assert_as_good_as_eager, error, in_layout, randn, same_bits

layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
SHAPES = [(2, 8, 9, 9), (1, 130, 70, 3), (3, 20)]


@layouts
@pytest.mark.parametrize("magnitude", [1e-35, 1e-25, 1e-17, 1e15, 1e25, 1e36])
def test_squares_beyond_float32(backend, layout, magnitude):
    """F.normalize gives 0 above, and with eps = 0 infinity below: here the result and its gradient are right."""
    for shape in SHAPES:
        x = in_layout(randn(*shape) * magnitude, layout).requires_grad_()
        dy = randn(*shape, seed=1)
        for eps in (0.0, 1e-12):
            y = channel_rms_norm(x, eps=eps, activation="silu")
            exact = oracles.channel_rms_norm(x, None, eps, None, None, True)
            assert_as_good_as_eager(y, exact, exact.float(), (shape, eps))
            (gradient,) = torch.autograd.grad(y, x, dy)
            (of_exact,) = torch.autograd.grad(exact, x, dy.double())
            largest = of_exact.abs().max()  # error() itself bounds it from below
            assert error(gradient / largest.float(), of_exact / largest) < 2e-6, (shape, eps)


@layouts
def test_one_extreme_pixel_beside_others(backend, layout):
    """The exact sums of one pixel leave its neighbours' bits alone."""
    x = randn(2, 24, 9, 11)
    alone = channel_rms_norm(in_layout(x, layout), activation="silu")
    x[1, :, 4, 5] *= 1e30
    beside = channel_rms_norm(in_layout(x, layout), activation="silu")
    assert error(beside, oracles.channel_rms_norm(x, None, 1e-12, None, None, True)) < 1e-6
    beside[1, :, 4, 5] = alone[1, :, 4, 5]
    assert same_bits(beside, alone)


@layouts
@pytest.mark.parametrize("dtype", STORAGE)
def test_pixels_of_zeros(backend, layout, dtype):
    """act(shift), and as F.normalize's a gradient that goes past the norm."""
    x, shift = randn(2, 8, 5, 7), randn(2, 8, seed=1)
    x[0] = x[1, :, 2, 3] = 0
    x = in_layout(x.to(dtype), layout).requires_grad_()
    y = channel_rms_norm(x, eps=1e-3, shift=shift, activation="silu")
    expected = torch.nn.functional.silu(shift[0].double())[:, None, None].expand(8, 5, 7)
    assert_as_good_as_eager(y[0], expected, expected.to(dtype), "y")
    dy = randn(2, 8, 5, 7, seed=2).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, dy)
    exact = oracles.channel_rms_norm(x, None, 1e-3, None, shift, True)
    (of_exact,) = torch.autograd.grad(exact, x, dy.double())
    assert_as_good_as_eager(gradient, of_exact, of_exact.to(dtype), "dx")


@layouts
def test_the_ends_of_float16(backend, layout):
    """Squares of 6e4 and of subnormals pass float16's range; the arithmetic is float32's."""
    for values in ((6e4 + 3e3 * randn(2, 64, 6, 7)).clamp(max=65504), 3e-6 * randn(2, 64, 6, 7)):
        x = in_layout(values.half(), layout)
        exact = oracles.channel_rms_norm(x, None, 1e-12, None, None, False)
        assert_as_good_as_eager(channel_rms_norm(x), exact, exact.half(), "float16")


@layouts
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("silu", [False, True])
def test_what_is_not_finite_stays_in_its_pixel(backend, layout, value, silu):
    activation = "silu" if silu else None
    x, scale = randn(2, 20, 5, 7), randn(2, 20, seed=1).requires_grad_()
    dy = randn(2, 20, 5, 7, seed=2)

    def run(x):
        x = in_layout(x, layout).requires_grad_()
        y = channel_rms_norm(x, scale=scale, activation=activation)
        return [y.detach(), *torch.autograd.grad(y, [x, scale], dy)]

    clean = run(x)
    x[1, 3, 2, 6] = value
    found = run(x)
    exact = oracles.channel_rms_norm(x, None, 1e-12, scale, None, silu)
    assert torch.equal(found[0].isnan(), exact.isnan())
    for a, b in zip(found[:2], clean[:2], strict=True):
        assert not bool(a[1, :, 2, 6].isfinite().all())
        a[1, :, 2, 6] = b[1, :, 2, 6]
        assert same_bits(a, b)
    assert same_bits(found[2][0], clean[2][0])


@layouts
def test_not_finite_in_dy(backend, layout):
    x, dy = in_layout(randn(2, 20, 5, 7), layout).requires_grad_(), randn(2, 20, 5, 7, seed=2)
    (clean,) = torch.autograd.grad(channel_rms_norm(x), x, dy)
    dy[0, 7, 4, 6] = torch.nan
    (found,) = torch.autograd.grad(channel_rms_norm(x), x, dy)
    assert bool(found[0, :, 4, 6].isnan().all())
    found[0, :, 4, 6] = clean[0, :, 4, 6]
    assert same_bits(found, clean)
