"""The RMS norm over channels + scale-shift + SiLU against F.normalize and what follows it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.compare import assert_close
from diffkern.ops import channel_rms_norm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WIDE, DEEP, TINY = (8, 64, 128, 128), (8, 512, 16, 16), (2, 32, 4, 4)
CASES = [(WIDE, True), (DEEP, True), ((8, 128, 32, 32), True), (TINY, True), ((8, 64, 64, 64), False)]
MODES = ["forward", "forward+backward"]
HEADLINES = {(WIDE, True, "contiguous", "forward"), (DEEP, True, "contiguous", "forward+backward")}


class Case:
    """Inputs, float64 result and the call; with scale-shift and SiLU, or the norm alone."""

    def __init__(self, shape, scale_shift, memory_format, mode, device):
        torch.manual_seed(0)
        self.mode, self.activation = mode, "silu" if scale_shift else None
        x = torch.randn(shape).contiguous(memory_format=FORMATS[memory_format])
        values = [x, torch.randn(shape[1])] + ([torch.randn(shape[0], 2 * shape[1])] if scale_shift else [])
        self.dy = torch.randn_like(x).to(device)
        self.inputs = [value.to(device).requires_grad_(mode != "forward") for value in values]
        doubles = [value.detach().double().requires_grad_(mode != "forward") for value in self.inputs]
        self.expected = self.run(eager.channel_rms_norm, doubles, self.dy.double()).detach()
        # The least: x and y; for dx also dy, and x once more because y must be whole before dy exists.
        self.bytes_moved = (5 if mode == "forward+backward" else 2) * x.nbytes
        form = "scale-shift, SiLU" if scale_shift else "plain"
        self.name = ", ".join([form, "×".join(map(str, shape)), memory_format])
        self.name += "" if mode == "forward" else ", forward + backward"

    def run(self, function, inputs=None, dy=None):
        x, weight, *projection = self.inputs if inputs is None else inputs
        extra = dict(zip(("scale", "shift"), projection[0].chunk(2, dim=1), strict=True)) if projection else {}
        y = function(x, weight, activation=self.activation, **extra)
        if self.mode == "forward":
            return y
        return torch.autograd.grad(y, [x, weight, *projection], self.dy if dy is None else dy)[0]


@pytest.mark.parametrize("memory_format", list(FORMATS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "scale_shift"), CASES, ids=str)
def test_channel_rms_norm(compare, device, shape, scale_shift, memory_format, mode):
    case = Case(shape, scale_shift, memory_format, mode, device)
    compare(
        "channel_rms_norm",
        case.name,
        "eager",
        lambda: case.run(channel_rms_norm),
        lambda: case.run(eager.channel_rms_norm),
        bytes_moved=case.bytes_moved,
        check=lambda result: assert_close(case.expected)(result.detach()),
        headline=(shape, scale_shift, memory_format, mode) in HEADLINES,
    )
