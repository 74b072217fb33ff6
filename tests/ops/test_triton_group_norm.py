"""group_norm's Triton kernels where launches are cut otherwise than small tensors would have it, and the cuts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffkern.backends import unavailable
from diffkern.ops import group_norm
from tests.ops import oracles
from tests.ops.cases import assert_as_good_as_eager, error, in_layout, randn, same_bits
from tests.ops.test_group_norm_offset import check, operands

if unavailable("triton"):
    pytest.skip(str(unavailable("triton")), allow_module_level=True)

from diffkern.ops._triton.launch import cdiv, next_power_of_2
from diffkern.ops.group_norm import launch_choices
from diffkern.ops.group_norm.launch_choices import Slabs, choose

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
PLAIN = (None, None, 1e-5, None, None, False)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int | None, int], None]:
    """Slices of some groups, in chunks of tiles of so many rows; rows of None is a slab that a program keeps."""

    def force(groups_of_slice: int, rows: int | None, tiles: int = 1) -> None:
        def chosen(samples: int, groups: int, per_group: int, pixels: int, *rest: object) -> Slabs:
            width = groups_of_slice * per_group
            lanes = next_power_of_2(width)
            if rows is None:
                return Slabs(width, lanes, next_power_of_2(pixels), 1, 1, True, 4)
            return Slabs(width, lanes, rows, tiles, cdiv(pixels, rows * tiles), False, 4)

        monkeypatch.setattr(launch_choices, "choose", chosen)

    return force


@layouts
@pytest.mark.parametrize("per_group", [1, 6, 12, 18, 42, 49])
@pytest.mark.parametrize("pieces", [(1, None, 1), (2, None, 1), (1, 4, 3), (2, 8, 1)])
def test_every_cut(backend, layout, per_group, pieces, cut):
    """y and all gradients, joined and modulated: chunks of three tiles and a rest, one group a slice and two."""
    cut(*pieces)
    channels = 2 * per_group
    skip_channels = channels // 2 + (per_group > 1)  # the boundary is within a group, or between two
    tensors = operands((2, channels - skip_channels, 5, 7), skip_channels, torch.float32, layout, layout)
    tensors["scale"] = randn(2, channels, seed=7)
    check(tensors, 2, True, (per_group, pieces))


@layouts
def test_16_bits_in_chunks(backend, layout, cut):
    cut(2, 8, 2)
    for dtype in (torch.bfloat16, torch.float16):
        check(operands((2, 8, 5, 9), 4, dtype, layout, layout), 4, True, dtype)


@layouts
@pytest.mark.parametrize("mean", [1e3, -1e4, 1e6])
def test_large_mean_in_chunks(backend, layout, mean, cut):
    """Also where the first tile says nothing of the mean: zeros come before the values."""
    cut(2, 16, 2)
    x = (randn(2, 8, 12, 12, dtype=torch.float64) + mean).float()
    begun = x.clone()
    begun[:, :, 0] = 0
    for values in (x, begun):
        values = in_layout(values, layout)
        y, exact = group_norm(values, 4), oracles.group_norm(values, 4, *PLAIN)
        assert_as_good_as_eager(y, exact, oracles.eager_group_norm(values, 4, *PLAIN), mean)
        assert error(y, exact) < 1e-6 + abs(mean) * 2**-24


@layouts
@pytest.mark.parametrize("value", [0.1, -7.3, 1e3])
def test_constant_groups_are_exactly_zero(backend, layout, value, cut):
    for pieces in [(1, None), (2, None), (2, 8, 2)]:
        cut(*pieces)
        x = randn(2, 6, 7, 7)
        x[1, 3:] = value
        y = group_norm(in_layout(x, layout), 2)
        assert error(y[1, 3:], torch.zeros(3, 7, 7)) == 0
        assert error(y, oracles.group_norm(x, 2, *PLAIN)) < 1e-6


@layouts
def test_nan_stays_in_its_group(backend, layout, cut):
    """Groups share a program, and its sums."""
    dy = randn(2, 12, 5, 7, seed=1)
    for pieces in [(4, None), (4, 8, 2)]:
        cut(*pieces)
        x = in_layout(randn(2, 12, 5, 7), layout)
        spoilt = x.clone()
        spoilt[1, 4, 2, 2] = torch.nan
        found = []
        for values in (x, spoilt):
            values.requires_grad_()
            y = group_norm(values, 4, activation="silu")
            found.append([y.detach(), *torch.autograd.grad(y, values, dy)])
        others = [c for c in range(12) if c not in (3, 4, 5)]
        for before, after in zip(*found, strict=True):
            assert same_bits(after[0], before[0])
            assert same_bits(after[1, others], before[1, others])
            assert bool(after[1, 3:6].isnan().all())


SHAPES = [
    (256, 128, 32, 32),
    (256, 256, 16, 16),
    (64, 192, 64, 64),
    (64, 384, 32, 32),
    (16, 256, 256, 256),
    (1, 128, 32, 32),
    (1, 256, 256, 256),
    (8, 1568, 7, 7),
    (3, 1344, 9, 11),
    (300, 640, 1, 1),
    (2, 32768, 3, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tensors", [1, 2])
def test_cuts_cover_the_tensor(backend, shape, tensors, monkeypatch):
    monkeypatch.setattr(launch_choices, "INTERPRETED", False)
    samples, channels, height, width = shape
    pixels = height * width
    for groups in (1, 32):
        for itemsize, channels_last in ((2, True), (2, False), (4, True), (4, False)):
            slabs = choose(
                samples, groups, channels // groups, pixels, itemsize, channels_last, torch.device("cpu"), tensors
            )
            assert channels % slabs.width == slabs.width % (channels // groups) == 0
            assert slabs.width <= slabs.lanes < 2 * slabs.width
            chunk = slabs.rows * slabs.tiles
            assert (slabs.chunks - 1) * chunk < pixels <= slabs.chunks * chunk
            assert slabs.rows * slabs.lanes <= 2**15 // (tensors if slabs.resident else 1)
            assert slabs.chunks <= 64
            assert 1 <= slabs.num_warps <= 32


def test_a_batch_of_one_fills_the_device(backend, monkeypatch):
    monkeypatch.setattr(launch_choices, "INTERPRETED", False)
    for channels, pixels in ((128, 128**2), (256, 256**2), (512, 64**2)):
        for channels_last in (False, True):
            slabs = choose(1, 32, channels // 32, pixels, 2, channels_last, torch.device("cpu"))
            assert channels // slabs.width * slabs.chunks >= 132
