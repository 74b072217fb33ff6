"""Mistakes that other libraries shipped, each with a test of its own name; the rest of them lie in the matrix.

More tiles than resident blocks, limits of a compiler's tiles and the like are a GPU's and have no counterpart here.
Tensors past 2^31 elements: test_large_tensors.py. Constant groups and large means: test_group_norm_extremes.py too.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.contract import CASES
from tests.ops.contract.case import Spec
from tests.ops.contract.check import check

BY_NAME = {case.name: case for case in CASES}
DIFFERENTIABLE = [case for case in CASES if case.differentiable]

every_form = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)


def hold(case, shape, **options) -> None:
    spec = Spec(shape, **options)
    check(case, spec, "grad", case.make(spec))


@every_form
@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (2, 6, 3, 5, 7)])
def test_gradients_in_four_and_five_dimensions(backend, case, shape):
    """A backward pass whose grid knew three dimensions wrote out of bounds (Liger-Kernel #1375)."""
    hold(case, shape)


@every_form
@pytest.mark.parametrize("batch", [255, 256, 257])
def test_batches_of_256(backend, case, batch):
    """A heuristic divided by zero (apex #1984)."""
    hold(case, (batch, 4, 3))


@every_form
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_arrive_in_another_layout(backend, case, layout):
    """Inductor hands on what it likes, also to a channels_last kernel (apex #1837)."""
    other = {"contiguous": "channels_last", "channels_last": "contiguous"}[layout]
    hold(case, (2, 12, 7, 5), layout=layout, other=other)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["group_norm SiLU alone", "group_norm weight and shift"])
def test_the_slope_of_silu_without_weight_or_bias(backend, name, layout):
    """SiLU's slope taken at the affine value although there is no affine (stable-fast)."""
    hold(BY_NAME[name], (3, 12, 7, 5), layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_weight_and_bias_in_channels_last(backend, layout):
    """They were wrong in one layout only (PyTorch #140913)."""
    hold(BY_NAME["group_norm affine"], (5, 24, 9, 11), layout=layout)


@every_form
@pytest.mark.parametrize("values", ["constant", "mean 1e3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variance_zero_and_large_means(backend, case, values, dtype):
    """Σx² − μ² is 0 or negative; 1/√eps replaced by 1 (apex, TensorRT's plugin)."""
    hold(case, (2, 12, 7, 13), dtype=dtype, values=values)
