"""offset and skip: act(GN(cat([x, skip], 1) + offset)) and its gradients, without the sum and the concatenation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.backends import unavailable
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

# (x's shape, skip's channels, groups): the boundary between two groups, within one, within the only one; more channels
# on either side; one channel a group; ranks 2 to 5; more pixels than a block; lengths that leave a piece of a vector.
SHAPES = [
    ((2, 6), 6, 2),
    ((3, 8, 5), 4, 3),
    ((2, 16, 4, 4), 16, 4),
    ((2, 20, 7, 7), 13, 3),
    ((2, 3, 5, 6), 9, 2),
    ((1, 5, 9, 10), 2, 7),
    ((2, 4, 3, 5, 7), 5, 3),
    ((1, 4, 70, 67), 2, 2),
    ((1, 40, 16, 16), 24, 4),
]
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def ours(x, groups, weight, bias, eps, scale, shift, silu, skip=None, offset=None) -> Tensor:
    activation = "silu" if silu else None
    return group_norm(
        x, groups, weight, bias, eps, skip=skip, offset=offset, scale=scale, shift=shift, activation=activation
    )


def results(function, tensors: dict[str, Tensor], groups: int, silu: bool, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of all tensors, by name."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    names = ("weight", "bias", "scale", "shift", "skip", "offset")
    weight, bias, scale, shift, skip, offset = (inputs.get(name) for name in names)
    y = function(inputs["x"], groups, weight, bias, 1e-5, scale, shift, silu, skip, offset)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(inputs, gradients, strict=True))


def check(tensors: dict[str, Tensor], groups: int, silu: bool, case: object) -> dict[str, Tensor]:
    x = tensors["x"]
    channels = x.shape[1] + (tensors["skip"].shape[1] if "skip" in tensors else 0)
    dy = randn(x.shape[0], channels, *x.shape[2:], seed=9).to(x.dtype)
    with Untouched(*tensors.values(), dy):
        found = results(ours, tensors, groups, silu, dy)
    exact = results(oracles.group_norm, tensors, groups, silu, dy)
    eager = results(oracles.eager_group_norm, tensors, groups, silu, dy)
    for name, value in found.items():
        assert value.dtype == (x if name == "y" else tensors[name]).dtype
        assert_as_good_as_eager(value, exact[name], eager[name], (case, name))
    assert memory_format(found["y"]) == memory_format(found["x"]) == memory_format(x)
    again = results(ours, tensors, groups, silu, dy)
    assert all(same_bits(again[name], value) for name, value in found.items())
    return found


def operands(
    shape: tuple[int, ...], skip_channels: int, dtype: torch.dtype, layout: str, other: str
) -> dict[str, Tensor]:
    samples, channels, *rest = shape
    joined = channels + skip_channels
    return {
        "x": in_layout(randn(*shape, seed=1).to(dtype), layout),
        "skip": in_layout((randn(samples, skip_channels, *rest, seed=2) * 2 + 1).to(dtype), other),
        "offset": randn(samples, 2 * joined, seed=3).to(dtype)[:, ::2] * 3,
        "weight": randn(joined, seed=4).to(dtype),
        "bias": randn(joined, seed=5).to(dtype),
        "shift": randn(samples, joined, seed=6),
    }


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape(backend, layout, dtype):
    """Alone and together; skip in another memory format than x, which decides."""
    for number, (shape, skip_channels, groups) in enumerate(SHAPES):
        tensors = operands(shape, skip_channels, dtype, layout, LAYOUTS[number % len(LAYOUTS)])
        check(tensors, groups, number % 2 == 0, (shape, "both"))
        if number % 3 == 0:
            del tensors["offset"]
            check(tensors, groups, True, (shape, "skip"))


@layouts
def test_offset_alone_in_every_channel_count(backend, layout):
    """Channels are taken four at a time where they are small: 2 to 9 a group, from no whole vector to many."""
    for per_group in range(2, 10):
        for size in ((1, 3), (4, 4), (5, 7)) if per_group != 5 else ((66, 65),):
            tensors = operands((2, 2 * per_group, *size), 0, torch.float32, layout, layout)
            del tensors["skip"]
            check(tensors, 2, per_group % 2 == 0, (per_group, size))


@layouts
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_offset_that_cancels_x(backend, layout, size):
    """x near −size and an offset near size: as good as the sum in float32, which is nearly exact there."""
    for shape, groups in [((2, 8, 16, 16), 2), ((2, 6, 7, 5), 6), ((1, 4, 66, 65), 1)]:
        x = in_layout((randn(*shape, dtype=torch.float64) - size).float(), layout)
        offset = (randn(shape[0], shape[1], seed=1, dtype=torch.float64) + size).float()
        check({"x": x, "offset": offset}, groups, True, (shape, size))


@layouts
def test_offset_that_makes_the_mean_large(backend, layout):
    """Rounding x + offset to float32 costs y up to 2⁻²⁴ of the mean; taken into the mean it costs next to nothing."""
    x = in_layout(randn(2, 8, 16, 16), layout)
    offset = (randn(2, 8, seed=1, dtype=torch.float64) + 1e4).float()
    found = check({"x": x, "offset": offset}, 2, False, "mean 1e4")
    if backend == "native":
        assert error(found["y"], oracles.group_norm(x, 2, None, None, 1e-5, None, None, False, None, offset)) < 1e-6


@layouts
def test_constant_channels(backend, layout):
    """What offsets make of constant channels: their distances are the whole variance, and without any y is 0."""
    x = in_layout(torch.full((2, 8, 7, 5), 0.1), layout)
    check({"x": x, "offset": randn(2, 8, seed=1)}, 2, True, "constant")
    assert error(group_norm(x, 2, offset=torch.full((2, 8), 1e3)), torch.zeros(2, 8, 7, 5)) == 0


@layouts
def test_offset_of_one_channel_a_group_does_nothing(backend, layout):
    """Each channel's mean is taken away: its gradient is 0 but for rounding."""
    x, offset = in_layout(randn(2, 6, 9, 11), layout), randn(2, 6, seed=1).requires_grad_()
    y = group_norm(x, 6, offset=offset, activation="silu")
    assert error(y, group_norm(x, 6, activation="silu")) < 1e-6
    (gradient,) = torch.autograd.grad(y, offset, randn(2, 6, 9, 11, seed=2))
    assert float(gradient.abs().max()) < 99 * 2**-20


def test_float64_and_gradcheck():
    for shape, skip_channels, groups in [((2, 4), 2, 3), ((2, 3, 2, 2), 3, 2), ((1, 2, 2, 1, 3), 1, 1)]:
        tensors = {
            k: v.double() for k, v in operands(shape, skip_channels, torch.float32, "channels_last", "sliced").items()
        }
        check(tensors, groups, True, shape)
        inputs = [tensors[name].requires_grad_() for name in ("x", "skip", "offset", "weight")]
        function = lambda x, skip, offset, w, g=groups: ours(x, g, w, None, 1e-3, None, None, True, skip, offset)  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs)


def test_offset_in_every_shape_and_stride(backend):
    x, offset = randn(3, 8, 5, 6), randn(3, 8, seed=1)
    expected = group_norm(x, 2, offset=offset)
    for other in (offset[:, :, None, None], offset.t().contiguous().t(), torch.stack([offset] * 2, 2)[:, :, 1]):
        assert same_bits(group_norm(x, 2, offset=other), expected)
    one = randn(1, 8, 1, 1, seed=2).requires_grad_()
    y = group_norm(x, 2, offset=one)
    assert same_bits(y.detach(), group_norm(x, 2, offset=one.detach().flatten(1).repeat(3, 1)))
    (gradient,) = torch.autograd.grad(y.square().sum(), one)
    assert gradient.shape == one.shape


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_offset_with_16_bits(backend, layout, dtype):
    tensors = operands((2, 8, 5, 7), 4, dtype, layout, layout) | {"offset": randn(2, 12, seed=3)}
    check(tensors, 2, True, dtype)


@layouts
def test_nan_stays_in_its_sample(backend, layout):
    tensors = operands((3, 6, 5, 7), 6, torch.float32, layout, layout)
    dy = randn(3, 12, 5, 7, seed=9)
    before = results(ours, tensors, 3, True, dy)
    for name in ("skip", "offset"):
        spoilt = tensors | {name: tensors[name].clone()}
        spoilt[name][1, 5] = torch.nan
        after = results(ours, spoilt, 3, True, dy)
        for result in ("y", "x", "skip", "offset"):
            assert same_bits(after[result][[0, 2]], before[result][[0, 2]])
        assert bool(after["y"][1].isnan().any())


def test_empty(backend):
    """No samples, no pixels, and one of the two without channels."""
    for shape, skip_channels in [((0, 4, 3, 3), 2), ((2, 4, 0, 3), 2), ((2, 0, 3, 3), 6), ((2, 6, 3, 3), 0)]:
        tensors = operands(shape, skip_channels, torch.float32, "contiguous", "contiguous")
        found = results(ours, tensors, 2, True, randn(shape[0], 6, *shape[2:], seed=9))
        assert {name: found[name].shape for name in tensors} == {name: t.shape for name, t in tensors.items()}
        exact = oracles.group_norm(
            tensors["x"], 2, None, None, 1e-5, None, None, False, tensors["skip"], tensors["offset"]
        )
        assert error(group_norm(tensors["x"], 2, skip=tensors["skip"], offset=tensors["offset"]), exact) < 1e-6


def test_gradients_do_not_share_memory(backend):
    for shape in [(1, 2), (1, 2, 4, 4)]:
        tensors = operands(shape, 2, torch.float32, "contiguous", "contiguous")
        found = results(ours, tensors, 2, False, randn(1, 4, *shape[2:], seed=9))
        addresses = [value.untyped_storage().data_ptr() for value in found.values()]
        assert len(set(addresses)) == len(addresses)


def test_another_skip_behind_autograds_back(backend):
    x, skip = randn(2, 4, 3, 3).requires_grad_(), randn(2, 4, 3, 3).requires_grad_()
    y = group_norm(x, 2, skip=skip)
    skip.data = randn(2, 6, 3, 3)
    with pytest.raises(RuntimeError, match="x beside skip had shape"):
        y.sum().backward()


@pytest.mark.skipif(unavailable("native") is not None, reason="no native module")
def test_skip_without_memory_is_not_read():
    x, skip = randn(2, 4, 3, 3), randn(2, 4, 3, 3)
    skip.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"skip .* has no memory"):
        group_norm(x, 2, skip=skip)
