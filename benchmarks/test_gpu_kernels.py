"""The table of GPU kernels, each beside what it is to reach. It needs a GPU: `--device cuda`."""

from __future__ import annotations

import pytest

from benchmarks.gpu_kernels import cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}, {case.name}")
def test_gpu_kernel(gpu_table, case):
    gpu_table(case)
