"""Linear attention with memory keys, as denoising-diffusion-pytorch has it, against softmaxes and matrix products."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.compare import assert_close
from diffkern.ops import linear_attention

HEADS, REMEMBERED = 4, 4
BATCH, LONG = (8, 32, 1024), (1, 32, 16384)
CASES = [BATCH, LONG, (8, 32, 256), (8, 64, 1024)]
MODES = ["forward", "forward+backward"]
HEADLINES = {(BATCH, False, "forward"), (LONG, True, "forward+backward")}


class Case:
    """Inputs, float64 result and the call. shape: (samples, channels of a head, pixels)."""

    def __init__(self, shape, channels_last, mode, device):
        torch.manual_seed(0)
        self.mode, self.channels_last = mode, channels_last
        samples, d, pixels = shape
        qkv, dout = torch.randn(samples, 3 * HEADS * d, pixels), torch.randn(samples, HEADS * d, pixels)
        qkv, self.dout = (x.transpose(1, 2).contiguous() if channels_last else x for x in (qkv, dout))
        values = [qkv, torch.randn(2, HEADS, d, REMEMBERED)]
        self.dout = self.dout.to(device)
        self.inputs = [value.to(device).requires_grad_(mode != "forward") for value in values]
        doubles = [value.detach().double().requires_grad_(mode != "forward") for value in self.inputs]
        self.expected = self.run(eager.linear_attention, doubles, self.dout.double()).detach()
        # The least: q, k, v and the result; for the gradients these again, and they.
        self.bytes_moved = (11 if mode == "forward+backward" else 4) * self.dout.nbytes
        order = "channels last" if channels_last else "contiguous"
        self.name = f"{samples}×{HEADS}×{d}×{pixels}, {order}"
        self.name += "" if mode == "forward" else ", forward + backward"

    def run(self, function, inputs=None, dout=None):
        qkv, memory = self.inputs if inputs is None else inputs
        out = function(qkv, HEADS, memory=memory, channels_last=self.channels_last)
        if self.mode == "forward":
            return out
        return torch.autograd.grad(out, [qkv, memory], self.dout if dout is None else dout)[0]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_linear_attention(compare, device, shape, channels_last, mode):
    case = Case(shape, channels_last, mode, device)
    compare(
        "linear_attention",
        case.name,
        "eager",
        lambda: case.run(linear_attention),
        lambda: case.run(eager.linear_attention),
        bytes_moved=case.bytes_moved,
        check=lambda result: assert_close(case.expected)(result.detach()),
        headline=(shape, channels_last, mode) in HEADLINES,
    )
