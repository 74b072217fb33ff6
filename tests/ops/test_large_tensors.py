"""Tensors of more than 2^31 elements: offsets of 64 bits, between samples and within one. Slow, and 9 GB of memory.

Values are looked at where 32 bits would wrap and at the end, and computed there anew: element by element from the
definition, or group by group in float64.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkern import backends
from diffkern.ops import group_norm, philox_normal, q_sample
from tests.ops import philox
from tests.ops.cases import randn

BOUNDARY = 2**31
DTYPE = torch.bfloat16


def available_bytes() -> int:
    status = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module"),
    pytest.mark.skipif(available_bytes() < 16 * 2**30, reason="needs 16 GiB of free memory"),
]


@pytest.fixture(autouse=True)
def _all_of_the_machine(two_threads):
    """Two threads, and memory that is not filled: 4 GB of NaN would double the time."""
    torch.use_deterministic_algorithms(False)


def normals_from(seed: int, sample: int, start: int, count: int) -> Tensor:
    """Exact normals of elements start … start + count of one sample; start and count are multiples of 4."""
    counters = np.zeros((count // 4, 4), dtype=np.uint64)
    counters[:, 0] = np.arange(start // 4, (start + count) // 4)
    counters[:, 2] = sample
    return torch.from_numpy(philox.exact_normals(philox.philox(seed, counters)))


def assert_normals(z: Tensor, size: int) -> None:
    """`z` (N, size) of seed 7, around element 2^31 of the whole tensor and at its end."""
    flat = z.reshape(-1)
    for start in (BOUNDARY - 512, flat.numel() - 512):
        for sample, first in {divmod(start, size), divmod(start + 256, size)}:
            first -= first % 4
            count = min(256, size - first)
            exact = normals_from(7, sample, first, count)
            found = z[sample, first : first + count].double()
            assert float((found - exact).abs().max()) < 2**-8 * float(exact.abs().max())


SHAPES = [(1, BOUNDARY + 4096), (2**16 + 3, 2**15)]


@pytest.mark.parametrize("shape", SHAPES)
def test_philox_normal(shape):
    assert_normals(philox_normal(shape, 7, dtype=DTYPE), shape[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample(shape):
    """x0 is 2 everywhere without taking memory of its own where samples may share theirs."""
    x0 = torch.full((1, shape[1]), 2.0, dtype=DTYPE).expand(shape)
    tables = torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    x_t = q_sample(x0, torch.zeros(shape[0], dtype=torch.int64), *tables, seed=7, stream=0)
    for row in (slice(0, 1), slice(shape[0] - 1, shape[0])):
        for part in (slice(0, 512), slice(shape[1] - 512, shape[1])):
            start = part.start
            expected = 1.0 + normals_from(7, row.start, start, 512)
            assert float((x_t[row, part].double() - expected).abs().max()) < 2**-6
    middle = divmod(BOUNDARY, shape[1])
    expected = 1.0 + normals_from(7, middle[0], middle[1], 512)
    assert float((x_t[middle[0], middle[1] : middle[1] + 512].double() - expected).abs().max()) < 2**-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 32, 2**26 + 64), (2**11 + 1, 32, 2**15)])
def test_group_norm(shape, layout):
    """The last group, and the one that element 2^31 is in."""
    samples, channels, pixels = shape
    x = torch.empty(samples, pixels, channels, dtype=DTYPE).movedim(-1, 1) if layout == "channels_last" else None
    x = torch.empty(shape, dtype=DTYPE) if x is None else x
    pattern = randn(pixels + 8 * channels).to(DTYPE)
    for c in range(channels):
        x[:, c] = pattern[8 * c : 8 * c + pixels]
    last = samples - 1
    x[last] *= 2
    y = group_norm(x, 16, activation="silu")
    for sample, group in {(last, 15), (min(last, BOUNDARY // (channels * pixels)), 15), (0, 0)}:
        part = slice(2 * group, 2 * group + 2)
        values = x[sample, part].double()
        mean, rstd = values.mean(), torch.rsqrt(values.var(correction=0) + 1e-5)
        for places in (slice(0, 4096), slice(pixels - 4096, pixels)):
            z = (values[:, places] - mean) * rstd
            exact = z * torch.sigmoid(z)
            assert float((y[sample, part, places].double() - exact).abs().max()) < 2**-8 * float(exact.abs().max())
