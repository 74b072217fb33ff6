"""An index out of range on a GPU: NaN in that sample alone, nothing waits; DIFFKERN_DEBUG=1 waits and raises."""

from __future__ import annotations

import pytest
import torch

from diffkern.ops import q_sample, solver_step
from tests.gpu.calls import PROCESS, ddpm

pytestmark = pytest.mark.gpu

OUT_OF_RANGE = [-1, 1000, 2**62, -(2**63)]
OPS = ["q_sample", "solver_step"]


def call(op, indices):
    """The op on 2×3×4×4 images of ones, and a function that calls it again with indices on the GPU."""
    x = torch.ones(len(indices), 3, 4, 4, device="cuda")
    if op == "solver_step":
        program = ddpm()
        return lambda rows: solver_step(x, x, program, rows, seed=1)
    tables = PROCESS.tables("cuda")
    return lambda t: q_sample(x, t, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod, seed=1)


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize("op", OPS)
def test_that_sample_is_nan_and_nothing_waits(op, bad, monkeypatch, no_synchronisation):
    monkeypatch.delenv("DIFFKERN_DEBUG", raising=False)
    good, mixed = (torch.tensor(values, device="cuda") for values in ([3, 3, 5], [3, bad, 5]))
    run = call(op, good)
    expected = run(good)  # also makes the tables, which a first call copies from the host
    with no_synchronisation():
        result = run(mixed)
    assert bool(result[1].isnan().all())
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize("op", OPS)
def test_debug_raises(op, bad, monkeypatch):
    monkeypatch.setenv("DIFFKERN_DEBUG", "1")
    indices = torch.tensor([3, bad, 5], device="cuda")
    with pytest.raises(ValueError, match=rf"must lie in \[0, 1000\), got {bad} at position 1"):
        call(op, indices)(indices)
