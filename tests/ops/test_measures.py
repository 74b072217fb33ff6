"""The tools of the tests see what they are for: an affine error, an element not written, a neighbour written."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.cases import LAYOUTS, assert_rounded_once, error, in_layout, randn, same_bits
from tests.ops.covering import pairwise
from tests.ops.guarded import Guarded, assert_written


@pytest.mark.parametrize("spoilt", [lambda y: y * 1.00001, lambda y: y + 1e-5, lambda y: y.roll(1), lambda y: -y])
def test_an_affine_error_is_one(spoilt):
    """Correlation with the right result is all but 1 for the first two (tt-metal #51159)."""
    exact = randn(3, 40, dtype=torch.float64)
    right = exact.float()
    assert_rounded_once(right, exact, right, torch.float32, "right")
    with pytest.raises(AssertionError, match="instead of"):
        assert_rounded_once(spoilt(right), exact, right, torch.float32, "spoilt")


def test_what_is_not_finite_hides_nothing():
    """Neither where it is, nor an error beside it."""
    exact = torch.tensor([torch.inf, torch.nan, 1.0], dtype=torch.float64)
    assert_rounded_once(exact.float(), exact, exact, torch.float32, "right")
    assert error(exact.float(), exact) == 0
    for wrong in (
        [torch.inf, torch.nan, 1.1],
        [-torch.inf, torch.nan, 1.0],
        [torch.nan, torch.nan, 1.0],
        [3.0, 2.0, 1.0],
    ):
        with pytest.raises(AssertionError):
            assert_rounded_once(torch.tensor(wrong), exact, exact, torch.float32, "wrong")
        assert error(torch.tensor(wrong), exact) > 0.01


def test_16_bit_results_are_rounded_once():
    exact = randn(3, 400, dtype=torch.float64)
    assert_rounded_once(exact.bfloat16(), exact, exact, torch.float32, "right")
    with pytest.raises(AssertionError, match="instead of"):
        assert_rounded_once((exact.bfloat16() * 1.5) / 1.5, exact, exact, torch.float32, "rounded three times")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_watched_memory(layout, dtype):
    values = in_layout(randn(3, 4, 5).to(dtype), layout)
    with Guarded() as memory:
        placed = memory.read_only("x", values)
        assert same_bits(placed, values)
        assert placed.stride() == values.stride()
        assert placed.data_ptr() % 64 == values.data_ptr() % 64
        fresh = torch.empty_like(values), torch.empty(3, 4, dtype=dtype), values.new_empty(2)
        assert all(bool(t.isnan().all()) for t in fresh)
        for t in fresh:
            with pytest.raises(AssertionError, match="was not written"):
                assert_written(t, "fresh")
            assert_written(t.fill_(torch.nan), "written")
    for offset in (-1, 3 * 4 * 5):
        with pytest.raises(AssertionError, match="written beside"), Guarded() as memory:
            torch.empty(3, 4, 5, dtype=dtype).view(-1).as_strided((1,), (1,), _guard(dtype) + offset).zero_()
    with pytest.raises(AssertionError, match="x or what surrounds it was written"), Guarded() as memory:
        memory.read_only("x", values)[0, 0, :1].zero_()


def _guard(dtype: torch.dtype) -> int:
    return 256 // dtype.itemsize


def test_every_two_values_meet():
    axes = ["abcd", "efg", "hi", "jklmn"]
    rows = pairwise(axes)
    assert rows == pairwise(axes)
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(axes[i], axes[j]))
    assert len(rows) < 30
