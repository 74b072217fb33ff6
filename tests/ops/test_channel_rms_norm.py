"""channel_rms_norm and its gradients: every layout, dtype and odd shape against float64, and beside eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.backends import unavailable, use_backend
from diffkern.ops import channel_rms_norm
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

NAMES = ("x", "weight", "scale", "shift")

# One channel and one pixel; ranks 2 to 5; no whole vector and a last one of every kind in both directions; more pixels
# than a block and more blocks than a unit; a batch over 256; more channels than fit a block.
SHAPES = [
    (1, 1),
    (3, 1, 5),
    (5, 6),
    (3, 5, 3),
    (2, 7, 1, 1),
    (2, 6, 3, 5, 7),
    (257, 4, 2, 2),
    (2, 33, 17, 9),
    (1, 64, 31, 33),
    (2, 3, 131, 67),
    (1, 1200, 3, 3),
    (300, 13),
    (1, 9000, 2),
]
EMPTY = [(0, 8, 4, 4), (2, 8, 0, 4), (0, 6), (2, 0, 3, 3), (2, 0)]


def parameters(shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """weight, and scale and shift as the two halves of one projection."""
    scale, shift = randn(shape[0], 2 * shape[1], seed=3).to(dtype).chunk(2, dim=1)
    every = {"weight": randn(shape[1], seed=2).to(dtype), "scale": scale, "shift": shift}
    return {name: every[name] for name in names}


def ours(x: Tensor, eps: float, silu: bool, weight=None, **rest) -> Tensor:
    return channel_rms_norm(x, weight, eps, activation="silu" if silu else None, **rest)


def eager(dtype: torch.dtype):
    """The formula in `dtype`: in float64 the oracle, in x's what the op replaces."""

    def run(x: Tensor, eps: float, silu: bool, weight=None, scale=None, shift=None) -> Tensor:
        return oracles.channel_rms_norm(x, weight, eps, scale, shift, silu, dtype)

    return run


def gradients(function, x: Tensor, eps: float, silu: bool, given: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of all that is given."""
    leaves = [t.detach().requires_grad_() for t in (x, *given.values())]
    y = function(leaves[0], eps, silu, **dict(zip(given, leaves[1:], strict=True)))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check(x: Tensor, eps: float, silu: bool, given: dict[str, Tensor], dy: Tensor, case: object) -> None:
    with Untouched(x, dy, *given.values()):
        found = gradients(ours, x, eps, silu, given, dy)
    exact = gradients(eager(torch.float64), x, eps, silu, given, dy)
    theirs = gradients(eager(x.dtype), x, eps, silu, given, dy)
    for name, t, f, e, other in zip(("y", "x", *given), (x, x, *given.values()), found, exact, theirs, strict=True):
        assert f.dtype == t.dtype
        if name != "x" or x.shape[1] != 1:  # the gradient of a sign: 0 but for rounding
            assert_as_good_as_eager(f, e, other, (case, name))
    assert memory_format(found[0]) == memory_format(found[1]) == memory_format(x)
    again = gradients(ours, x, eps, silu, given, dy)
    assert all(same_bits(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape(backend, layout, dtype):
    for number, shape in enumerate([*SHAPES, *EMPTY]):
        x = in_layout((randn(*shape, seed=1) * 2 + 0.5).to(dtype), layout)
        dy = in_layout(randn(*shape, seed=4).to(dtype), LAYOUTS[number % len(LAYOUTS)])
        names = [(), NAMES[1:], ("weight",), ("scale",), ("shift",), ("weight", "shift")][number % 6]
        check(x, 1e-12, number % 4 != 0, parameters(shape, names, dtype), dy, (shape, names))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_norms_around_eps(backend, layout, silu):
    """Below eps the norm is a constant, y linear in x and its gradient nothing but scaled; the next pixel's is not."""
    x = randn(2, 12, 9, 7) * torch.logspace(-3, 1, 63).reshape(9, 7)
    dy = randn(2, 12, 9, 7, seed=1)
    for eps in (0.1, 1.0):
        check(in_layout(x, layout), eps, silu, parameters((2, 12), NAMES[1:], torch.float32), dy, eps)


def test_a_norm_that_is_eps_passes_its_gradient(backend):
    """As clamp's does at its end."""
    x, dy = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -2.0]])
    check(x, 5.0, False, {}, dy, "norm 5")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_computed_in_float64(layout):
    for shape in [*SHAPES[:-2], *EMPTY]:
        x = in_layout(randn(*shape, dtype=torch.float64), layout)
        given, dy = parameters(shape, NAMES[1:], torch.float64), randn(*shape, seed=4, dtype=torch.float64)
        found = gradients(ours, x, 1e-12, True, given, dy)
        exact = gradients(eager(torch.float64), x, 1e-12, True, given, dy)
        for number, (f, e) in enumerate(zip(found, exact, strict=True)):
            if number != 1 or shape[1] != 1:
                assert error(f, e) < 2**-46, (shape, number)  # both round, and in float32 it would be 2**-23


def test_scale_and_shift_in_every_shape_and_stride(backend):
    """(N, C), with ones, broadcast over the batch, chunks on axis 1, transposed; a strided weight."""
    x, table = randn(3, 8, 5, 6), randn(8, 3, seed=4)
    weight, (scale, shift) = table[:, 1], randn(3, 16, seed=1).chunk(2, dim=1)
    expected = ours(x, 1e-12, True, weight.contiguous(), scale=scale.contiguous(), shift=shift.contiguous())
    assert same_bits(ours(x, 1e-12, True, weight, scale=scale, shift=shift), expected)
    ones = [p[:, :, None, None] for p in (scale.t().contiguous().t(), shift)]
    assert same_bits(ours(x, 1e-12, True, weight, scale=ones[0], shift=ones[1]), expected)
    one = randn(1, 8, 1, 1, seed=2)
    repeated = one.expand(3, 8, 1, 1).reshape(3, 8).contiguous()
    assert same_bits(ours(x, 1e-12, False, scale=one, shift=one), ours(x, 1e-12, False, scale=repeated, shift=repeated))


def test_gradients_arrive_at_projections_and_broadcast_parameters(backend):
    x, dy = randn(3, 8, 5, 6), randn(3, 8, 5, 6, seed=3)
    projection, one = randn(3, 16, seed=1).requires_grad_(), randn(1, 8, 1, 1, seed=2).requires_grad_()

    def value(function):
        scale, shift = projection.chunk(2, dim=1)
        broadcast = one if function is ours else one.expand(3, 8, 1, 1)
        y = function(x, 1e-12, True, scale=scale, shift=shift) + function(x, 1e-12, False, scale=broadcast)
        return (y * dy.to(y.dtype)).sum()

    found = torch.autograd.grad(value(ours), [projection, one])
    exact = torch.autograd.grad(value(eager(torch.float64)), [projection, one])
    for f, e in zip(found, exact, strict=True):
        assert_as_good_as_eager(f, e, e.float(), tuple(f.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_dy_does_not_matter(backend, layout):
    """What Inductor hands to a backward pass need not be in x's memory format; nor is an expanded one."""
    for shape in [(2, 6, 15), (2, 6, 5, 7), (2, 6, 3, 5, 7)]:
        for x_layout in ("contiguous", "channels_last"):
            x, given = in_layout(randn(*shape), x_layout), parameters(shape, NAMES[1:], torch.float32)
            for dy in (in_layout(randn(*shape, seed=1), layout), randn(2, 6, *(len(shape) - 2) * [1]).expand(shape)):
                expected = gradients(ours, x, 1e-12, True, given, dy.contiguous())
                found = gradients(ours, x, 1e-12, True, given, dy)
                for a, b in zip(found, expected, strict=True):
                    assert same_bits(a, b) if backend == "native" else error(a, b) < 1e-6


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(backend, wanted):
    tensors = {"x": randn(2, 6, 5, 7), **parameters((2, 6), NAMES[1:], torch.float32)}
    leaf = tensors[wanted] = tensors[wanted].detach().requires_grad_()
    x, dy = tensors.pop("x"), randn(2, 6, 5, 7, seed=4)
    (found,) = torch.autograd.grad(ours(x, 1e-12, True, **tensors), leaf, dy)
    (exact,) = torch.autograd.grad(eager(torch.float64)(x, 1e-12, True, **tensors), leaf, dy.double())
    assert_as_good_as_eager(found, exact, exact.float(), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(backend, layout):
    x, silu = randn(6, 24, 15, 17), backend == "native"  # torch's own sigmoid depends on where a value lies
    whole = ours(in_layout(x, layout), 1e-12, silu)
    for n in range(6):
        assert same_bits(ours(in_layout(x[n : n + 1], layout), 1e-12, silu), whole[n : n + 1])


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, silu):
    for shape in [(2, 4), (2, 6, 3), (2, 4, 3, 2), (1, 4, 2, 1, 3)]:
        inputs = [in_layout(randn(*shape, dtype=torch.float64), layout).requires_grad_()]
        inputs += [p.detach().requires_grad_() for p in parameters(shape, NAMES[1:], torch.float64).values()]
        for eps in (1e-12, 10.0):
            function = lambda x, w, s, h, e=eps: ours(x, e, silu, w, scale=s, shift=h)  # noqa: E731
            assert torch.autograd.gradcheck(function, inputs)


def test_a_second_derivative_is_refused_with_a_reason(backend):
    x = randn(2, 4, 3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(channel_rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="channel_rms_norm_backward has no derivative"):
        gradient.sum().backward()


def test_compiled_without_breaks_and_under_torch_func(backend):
    given = parameters((2, 6), NAMES[1:], torch.float32)
    x, dy = randn(2, 6, 5, 7).requires_grad_(), randn(2, 6, 5, 7, seed=1)
    expected = gradients(ours, x, 1e-12, True, given, dy)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(gradients(compiled, x, 1e-12, True, given, dy), expected, strict=True))
    found = torch.func.grad(lambda x: (ours(x, 1e-12, True, **given) * dy).sum())(x.detach())
    assert same_bits(found, expected[1])


@pytest.mark.skipif(unavailable("native") is not None, reason="no native module")
def test_native_refuses_float64_by_name():
    with use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        channel_rms_norm(randn(2, 4, dtype=torch.float64))
