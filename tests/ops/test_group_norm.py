"""y = act(GN(x)·(1 + scale) + shift): every dtype, layout and odd shape against float64, and beside eager PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from diffkern.backends import unavailable, use_backend
from diffkern.ops import group_norm
from tests.ops import oracles
from tests.ops.cases import (
    LAYOUTS,
    STORAGE,
    Untouched,
    assert_as_good_as_eager,
    in_layout,
    memory_format,
    randn,
    same_bits,
)

# (shape, groups): channels a group 1, 6, 42, 49 and primes; C = G and G = 1; HW = 1; ranks 2 to 5; batch 257; more
# values than one block of any kernel, in a slab and in a column of pixels.
SHAPES = [
    ((2, 4), 2),
    ((3, 5, 3), 5),
    ((3, 6, 7, 7), 6),
    ((2, 12, 7, 7), 2),
    ((2, 84, 5, 3), 2),
    ((1, 98, 7, 7), 2),
    ((2, 13, 11, 17), 13),
    ((1, 13, 11, 17), 1),
    ((2, 8, 1, 1), 2),
    ((2, 12, 3, 5, 7), 3),
    ((257, 4, 2, 2), 2),
    ((1, 64, 48, 48), 32),
    ((2, 3, 70, 67), 1),
    ((1, 1200, 3, 3), 8),
]
EMPTY = [((0, 8, 4, 4), 2), ((2, 8, 0, 4), 2), ((0, 6), 3), ((2, 0, 3, 3), 1)]
FORMS = list(itertools.product([False, True], repeat=3))  # affine, scale-shift, SiLU


def parameters(shape: tuple[int, ...], affine: bool, modulated: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """weight, bias, and scale, shift as the two halves of one projection."""
    channels = shape[1]
    weight, bias = randn(2, channels, seed=2).to(dtype).unbind(0)
    scale, shift = randn(shape[0], 2 * channels, seed=3).to(dtype).chunk(2, dim=1)
    return [weight if affine else None, bias if affine else None, *([scale, shift] if modulated else [None, None])]


def run(x: Tensor, groups: int, weight, bias, eps, scale, shift, silu) -> Tensor:
    activation = "silu" if silu else None
    return group_norm(x, groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)


def check(x: Tensor, groups: int, options: list, case: object) -> None:
    with Untouched(x, *(p for p in options if isinstance(p, Tensor))):
        y = run(x, groups, *options)
    exact = oracles.group_norm(x, groups, *options)
    one_value = x.shape[0] * x.shape[1:].numel() // groups <= x.shape[0]
    eager = exact.to(x.dtype) if one_value or x.numel() == 0 else oracles.eager_group_norm(x, groups, *options)
    assert_as_good_as_eager(y, exact, eager, case)
    assert y.dtype == x.dtype
    assert memory_format(y) == memory_format(x)
    assert same_bits(run(x, groups, *options), y)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape(backend, layout, dtype):
    for number, (shape, groups) in enumerate([*SHAPES, *EMPTY]):
        x = in_layout((randn(*shape, seed=1) * 2 + 0.5).to(dtype), layout)
        for form in (FORMS[number % 8], FORMS[-1]):
            affine, modulated, silu = form
            weight, bias, scale, shift = parameters(shape, affine, modulated, dtype)
            check(x, groups, [weight, bias, 1e-5, scale, shift, silu], (shape, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_form(backend, layout, form):
    affine, modulated, silu = form
    for shape, groups in [((3, 42, 9, 10), 7), ((2, 33, 5, 5), 11)]:
        weight, bias, scale, shift = parameters(shape, affine, modulated, torch.float32)
        x = in_layout(randn(*shape), layout)
        check(x, groups, [weight, bias, 1e-6, scale, shift, silu], shape)
        check(x, groups, [weight, None, 1e-6, None, shift, silu], shape)
        check(x, groups, [None, bias, 1e-6, scale, None, silu], shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_computed_in_float64(layout):
    for shape, groups in [*SHAPES, *EMPTY]:
        x = in_layout(randn(*shape, dtype=torch.float64), layout)
        weight, bias, scale, shift = parameters(shape, True, True, torch.float64)
        check(x, groups, [weight, bias, 1e-5, scale, shift, True], shape)


def test_scale_and_shift_in_every_shape_and_stride(backend):
    """(N, C), with ones, broadcast over the batch, chunks on axis 1, expanded, transposed."""
    x = randn(3, 8, 5, 6)
    scale, shift = randn(3, 16, seed=1).chunk(2, dim=1)
    expected = run(x, 4, None, None, 1e-5, scale.contiguous(), shift.contiguous(), True)
    assert same_bits(run(x, 4, None, None, 1e-5, scale, shift, True), expected)
    assert same_bits(run(x, 4, None, None, 1e-5, scale[:, :, None, None], shift[:, :, None, None], True), expected)
    transposed = scale.t().contiguous().t()
    assert same_bits(run(x, 4, None, None, 1e-5, transposed, shift, True), expected)
    one = randn(1, 8, 1, 1, seed=2)
    repeated = one.expand(3, 8, 1, 1).reshape(3, 8).contiguous()
    assert same_bits(
        run(x, 4, None, None, 1e-5, one, one, False), run(x, 4, None, None, 1e-5, repeated, repeated, False)
    )
    constant = torch.full((1, 1), 0.3).expand(3, 8)
    assert same_bits(
        run(x, 4, None, None, 1e-5, constant, None, False),
        run(x, 4, None, None, 1e-5, constant.contiguous(), None, False),
    )


def test_strided_weight_and_bias(backend):
    x, table = randn(2, 8, 5, 5), randn(8, 3, seed=1)
    expected = run(x, 2, table[:, 0].contiguous(), table[:, 2].contiguous(), 1e-5, None, None, False)
    assert same_bits(run(x, 2, table[:, 0], table[:, 2], 1e-5, None, None, False), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(backend, layout):
    x = randn(6, 24, 15, 17)
    whole = group_norm(in_layout(x, layout), 4)
    for n in range(6):
        assert same_bits(group_norm(in_layout(x[n : n + 1], layout), 4), whole[n : n + 1])


def test_one_value_a_group_is_its_bias(backend):
    x, bias = randn(1, 6), randn(6, seed=1)
    assert same_bits(group_norm(x, 6, randn(6, seed=2), bias), bias.unsqueeze(0))


@pytest.mark.skipif(unavailable("native") is not None, reason="no native module")
def test_native_refuses_float64_by_name():
    with use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        group_norm(randn(2, 4, dtype=torch.float64), 2)
