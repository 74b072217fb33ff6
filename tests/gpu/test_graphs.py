"""Each op in a CUDA graph: a replay reads its inputs anew, and what noise it makes follows the seed in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.ops import philox_normal, q_sample
from tests.gpu.calls import CALLS, PROCESS, randn, times

pytestmark = pytest.mark.gpu


def captured(call) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of a call, and where it writes; called once before, as what is compiled then cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("name", CALLS)
def test_replays_follow_the_inputs(name):
    inputs, function, _ = CALLS[name]
    stored = {key: value.float().cuda() for key, value in inputs.items()}
    graph, result = captured(lambda: function(**stored))
    for factor in (0.5, 3.0):
        for value in stored.values():
            value.mul_(factor)
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, function(**stored))


@pytest.mark.parametrize("op", ["philox_normal", "q_sample"])
def test_replays_draw_fresh_noise(op):
    seed, draw = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2))
    x0, tables = randn(3, 8, 6, 5, seed=1).float().cuda(), PROCESS.tables("cuda")
    t = times(x0.device)

    def call() -> Tensor:
        if op == "philox_normal":
            return philox_normal(x0.shape, seed, draw=draw)
        return q_sample(x0, t, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod, seed=seed, draw=draw)

    graph, result = captured(call)
    seen = []
    for number in range(3):
        seed.fill_(number // 2)
        draw.fill_(number)
        graph.replay()
        assert torch.equal(result, call())
        seen.append(result.clone())
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
