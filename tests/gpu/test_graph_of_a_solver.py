"""A solver's step in a CUDA graph: row and seed are tensors that a replay reads anew."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffkern.ops import solver_step
from tests.gpu.calls import ddpm, randn

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("per_sample", [False, True], ids=["one row", "a row per sample"])
def test_replays_follow_row_and_seed(per_sample):
    program = ddpm()
    x, output = (randn(4, 3, 8, 8, seed=k).float().cuda() for k in range(2))
    row = torch.zeros((4,) if per_sample else (), dtype=torch.int64, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step():
        return solver_step(x, output, program, row, seed=seed)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    seen = []
    for number in (0, 1, 500, program.num_rows - 1):
        row.fill_(number)
        if per_sample:
            row[1] = (number + 7) % program.num_rows
        seed.fill_(number - 2)
        x.add_(0.25)
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, step())
        seen.append(captured.clone())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
