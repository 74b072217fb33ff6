"""GroupNorm + SiLU against F.silu(F.group_norm(x)) and its compiled form; tiny tensors show what a call costs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.baselines import compiled
from benchmarks.compare import assert_close
from diffkern.ops import group_norm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LARGE, SMALL, TINY = (8, 128, 32, 32), (8, 256, 8, 8), (2, 32, 4, 4)
CASES = [(LARGE, ""), (SMALL, ""), ((64, 128, 32, 32), ""), (TINY, ""), (LARGE, "scale-shift")]
MODES = ["forward", "forward+backward"]
HEADLINES = {
    (LARGE, "", "contiguous", "forward"),
    (LARGE, "", "channels_last", "forward+backward"),
    (LARGE, "scale-shift", "contiguous", "forward"),
    (SMALL, "", "contiguous", "forward+backward"),
    (TINY, "", "contiguous", "forward"),
}


class Case:
    """Inputs, float64 result and the call; mode "forward, requires grad" records the graph and goes no further."""

    def __init__(self, shape, scale_shift, memory_format, mode, device):
        torch.manual_seed(0)
        self.mode, wants_grad = mode, mode != "forward"

        def leaf(*size):
            return torch.randn(size)

        x = leaf(*shape).contiguous(memory_format=FORMATS[memory_format])
        values = [x, leaf(shape[1]), leaf(shape[1])] + ([leaf(shape[0], 2 * shape[1])] if scale_shift else [])
        self.dy = torch.randn_like(x).to(device)
        self.inputs = [value.to(device).requires_grad_(wants_grad) for value in values]
        doubles = [value.detach().double().requires_grad_(wants_grad) for value in self.inputs]
        self.expected = self.run(eager.group_norm, doubles, self.dy.double()).detach()
        # The least: x and y; for dx also dy, and x once more because y must be whole before dy exists.
        self.bytes_moved = (5 if mode == "forward+backward" else 2) * x.nbytes
        self.name = ", ".join(
            [f"SiLU, {'×'.join(map(str, shape))}, {memory_format}"]
            + (["scale-shift"] if scale_shift else [])
            + ([] if mode == "forward" else [mode.replace("+", " + ")])
        )

    def run(self, function, inputs=None, dy=None):
        x, weight, bias, *projection = self.inputs if inputs is None else inputs
        extra = dict(zip(("scale", "shift"), projection[0].chunk(2, dim=1), strict=True)) if projection else {}
        y = function(x, 32, weight, bias, activation="silu", **extra)
        if self.mode != "forward+backward":
            return y
        return torch.autograd.grad(y, [x, weight, bias, *projection], self.dy if dy is None else dy)[0]

    def check(self, result):
        assert_close(self.expected)(result.detach())


@pytest.mark.parametrize("memory_format", list(FORMATS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "scale_shift"), CASES, ids=str)
def test_group_norm(compare, device, shape, scale_shift, memory_format, mode):
    case = Case(shape, scale_shift, memory_format, mode, device)
    compare(
        "group_norm",
        case.name,
        "eager",
        lambda: case.run(group_norm),
        lambda: case.run(eager.group_norm),
        bytes_moved=case.bytes_moved,
        check=case.check,
        headline=(shape, scale_shift, memory_format, mode) in HEADLINES,
    )


@pytest.mark.parametrize("memory_format", list(FORMATS))
def test_group_norm_recording_a_graph(compare, device, memory_format):
    """A forward call of tensors that require grad: what autograd adds to a small call."""
    case = Case(TINY, "", memory_format, "forward, requires grad", device)
    compare(
        "group_norm",
        case.name,
        "eager",
        lambda: case.run(group_norm),
        lambda: case.run(eager.group_norm),
        bytes_moved=case.bytes_moved,
        check=case.check,
    )


@pytest.mark.parametrize("memory_format", list(FORMATS))
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=str)
def test_group_norm_compiled(compare, device, shape, memory_format):
    case = Case(shape, "", memory_format, "forward", device)
    x, weight, bias = case.inputs
    fused = compiled(lambda x, weight, bias: eager.group_norm(x, 32, weight, bias, activation="silu"))
    compare(
        "group_norm",
        case.name,
        "torch.compile",
        lambda: case.run(group_norm),
        lambda: fused(x, weight, bias),
        bytes_moved=case.bytes_moved,
        check=case.check,
        check_baseline=case.check,
        headline=(shape, memory_format) == (LARGE, "contiguous"),
    )
