"""Gradients of x, weight, bias, scale and shift against float64, and beside those of the eager composition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.backends import use_backend
from diffkern.ops import group_norm
from tests.ops import oracles
from tests.ops.cases import (
    LAYOUTS,
    STORAGE,
    Untouched,
    assert_as_good_as_eager,
    error,
    in_layout,
    memory_format,
    randn,
    same_bits,
)
from tests.ops.test_group_norm import EMPTY, SHAPES, parameters

NAMES = ("x", "weight", "bias", "scale", "shift")


def leaves(x: Tensor, options: list[Tensor | None]) -> list[Tensor | None]:
    """Fresh leaves with the layout of the given tensors."""
    return [None if t is None else t.detach().requires_grad_() for t in (x, *options)]


def gradients(function, inputs: list[Tensor | None], groups: int, silu: bool, dy: Tensor) -> list[Tensor | None]:
    x, weight, bias, scale, shift = inputs
    y = function(x, groups, weight, bias, 1e-5, scale, shift, silu)
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype)))
    return [None if t is None else next(found) for t in inputs]


def ours(x, groups, weight, bias, eps, scale, shift, silu) -> Tensor:
    return group_norm(x, groups, weight, bias, eps, scale=scale, shift=shift, activation="silu" if silu else None)


def check(x: Tensor, groups: int, options: list, silu: bool, dy: Tensor, case: object) -> None:
    inputs = leaves(x, options)
    with Untouched(*(t for t in inputs if t is not None), dy):
        found = gradients(ours, inputs, groups, silu, dy)
    exact = gradients(oracles.group_norm, inputs, groups, silu, dy)
    if x.numel() and x.shape[1:].numel() > groups:
        eager = gradients(oracles.eager_group_norm, inputs, groups, silu, dy)
    else:
        eager = [None if g is None else g.to(x.dtype) for g in exact]
    for name, t, g, e, other in zip(NAMES, inputs, found, exact, eager, strict=True):
        if t is not None:
            assert g.dtype == t.dtype
            assert_as_good_as_eager(g, e, other, (case, name))
    assert memory_format(found[0]) == memory_format(x)
    again = gradients(ours, inputs, groups, silu, dy)
    assert all(a is b is None or same_bits(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape(backend, layout, dtype):
    for number, (shape, groups) in enumerate([*SHAPES, *EMPTY]):
        x = in_layout(randn(*shape, seed=1).to(dtype), layout)
        dy = in_layout(randn(*shape, seed=4).to(dtype), LAYOUTS[number % len(LAYOUTS)])
        check(x, groups, parameters(shape, True, True, dtype), True, dy, (shape, "scale-shift, SiLU"))
        affine, modulated, silu = number % 2 == 0, number % 3 == 0, number % 4 == 0
        check(x, groups, parameters(shape, affine, modulated, dtype), silu, dy, (shape, affine, modulated, silu))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_dy_does_not_matter(backend, layout):
    """What Inductor hands to a backward pass need not be in x's memory format."""
    for shape in [(2, 6, 15), (2, 6, 5, 7), (2, 6, 3, 5, 7)]:
        for x_layout in ("contiguous", "channels_last"):
            inputs = leaves(in_layout(randn(*shape), x_layout), parameters(shape, True, True, torch.float32))
            dy = in_layout(randn(*shape, seed=1), layout)
            expected = gradients(ours, inputs, 2, True, dy.contiguous())
            found = gradients(ours, inputs, 2, True, dy)
            for a, b in zip(found, expected, strict=True):
                assert same_bits(a, b) if backend == "native" else error(a, b) < 1e-6


def test_expanded_dy(backend):
    """What the backward pass of a mean over the pixels hands on."""
    x, dy = randn(2, 6, 5, 7).requires_grad_(), randn(2, 6, 1, 1, seed=1).expand(2, 6, 5, 7)
    (found,) = torch.autograd.grad(ours(x, 2, None, None, 1e-5, None, None, True), x, dy)
    options = (None, None, 1e-5, None, None, True)
    exact = torch.autograd.grad(oracles.group_norm(x, 2, *options), x, dy.double())[0]
    eager = torch.autograd.grad(oracles.eager_group_norm(x, 2, *options), x, dy)[0]
    assert_as_good_as_eager(found, exact, eager, "expanded")


def test_scale_and_shift_as_chunks_of_one_projection(backend):
    """The gradient arrives at the projection; (1, C, 1, 1) sums over the batch."""
    x = randn(3, 8, 5, 6)
    projection, one = randn(3, 16, seed=1).requires_grad_(), randn(1, 8, 1, 1, seed=2).requires_grad_()
    dy = randn(3, 8, 5, 6, seed=3)

    def value(function):
        scale, shift = projection.chunk(2, dim=1)
        y = function(x, 4, None, None, 1e-5, scale, shift, True)
        z = function(x, 4, None, None, 1e-5, one if function is ours else one.expand(3, 8, 1, 1), None, False)
        return ((y + z) * dy.to(y.dtype)).sum()

    found = torch.autograd.grad(value(ours), [projection, one])
    exact = torch.autograd.grad(value(oracles.group_norm), [projection, one])
    for f, e in zip(found, exact, strict=True):
        assert_as_good_as_eager(f, e, e.float(), tuple(f.shape))


@pytest.mark.parametrize("shape", [(1, 1), (3, 6), (3, 6, 1, 1), (257, 4)])
def test_one_value_a_group_has_no_gradient(backend, shape):
    """dx is 0 but for the rounding of its terms, each as large as rstd·dy."""
    x, dy = randn(*shape).requires_grad_(), randn(*shape, seed=1)
    (gradient,) = torch.autograd.grad(group_norm(x, shape[1]), x, dy)
    assert float(gradient.abs().max()) <= 2**-23 * 1e-5**-0.5 * float(dy.abs().max())


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(backend, wanted):
    shape = (2, 6, 5, 7)
    tensors = dict(zip(NAMES, [randn(*shape), *parameters(shape, True, True, torch.float32)], strict=True))
    leaf = tensors[wanted] = tensors[wanted].detach().requires_grad_()
    x, weight, bias, scale, shift = tensors.values()
    dy = randn(*shape, seed=4)
    (found,) = torch.autograd.grad(ours(x, 2, weight, bias, 1e-5, scale, shift, True), leaf, dy)
    exact = oracles.group_norm(x, 2, weight, bias, 1e-5, scale, shift, True)
    (exact_gradient,) = torch.autograd.grad(exact, leaf, dy.double())
    assert_as_good_as_eager(found, exact_gradient, exact_gradient.float(), wanted)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, silu):
    for shape, groups in [((2, 4), 2), ((2, 6, 3), 3), ((2, 4, 3, 2), 2), ((1, 4, 2, 1, 3), 4)]:
        inputs = [in_layout(randn(*shape, dtype=torch.float64), layout).requires_grad_()]
        inputs += [p.detach().requires_grad_() for p in parameters(shape, True, True, torch.float64)]
        with use_backend("reference"):
            function = lambda x, w, b, s, h, g=groups: ours(x, g, w, b, 1e-3, s, h, silu)  # noqa: E731
            assert torch.autograd.gradcheck(function, inputs)


def test_a_second_derivative_is_refused_with_a_reason(backend):
    x = randn(2, 4, 3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(group_norm(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_backward has no derivative"):
        gradient.sum().backward()
