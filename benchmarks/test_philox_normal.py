"""The noise source against torch.randn."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare import assert_close
from diffkern.backends import use_backend
from diffkern.ops import philox_normal


@pytest.mark.parametrize("shape", [(64, 65536), (256, 3, 32, 32)], ids=str)
def test_philox_normal(compare, device, shape):
    with use_backend("reference"):
        expected = philox_normal(shape, 1, dtype=torch.float64)
    compare(
        "philox_normal",
        "×".join(map(str, shape)),
        "torch.randn",
        lambda: philox_normal(shape, 1, device=device),
        lambda: torch.randn(shape, device=device),
        bytes_moved=4 * expected.numel(),
        check=assert_close(expected),
        headline=len(shape) == 2,
    )
