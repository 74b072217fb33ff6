"""Softmax attention at the sizes of U-Nets, against SDPA with the reshapes and copies that each layout costs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.compare import assert_close
from diffkern import ops

# (B, heads, T, d): UNet2DModel with the channels of DDPM CIFAR-10 and as it is, google/ddpm-cifar10-32, ADM's network
# for 64², and one image through the first, DDPM's network for 256², a single head at 8² and the autoencoder of latent
# models for 512².
HEADS_OF_8, WIDE = (8, 32, 256, 8), (2, 56, 1024, 8)
SHAPES = [
    HEADS_OF_8,
    WIDE,
    (8, 1, 256, 256),
    (8, 9, 256, 64),
    (4, 6, 1024, 64),
    (8, 12, 64, 64),
    (1, 32, 256, 8),
    (1, 1, 256, 512),
    (1, 1, 64, 256),
    (1, 1, 4096, 512),
]
TRAINED = [HEADS_OF_8, (8, 1, 256, 256), (8, 9, 256, 64)]
LAYOUTS = ("qkvhc", "hqkvc", "hcqkv", "[B, T, C]")
CASES = [(shape, layout, "forward") for shape in SHAPES for layout in LAYOUTS]
CASES += [(shape, layout, "forward + backward") for shape in TRAINED for layout in ("qkvhc", "[B, T, C]")]
HEADLINES = {(HEADS_OF_8, "qkvhc", "forward"), (WIDE, "qkvhc", "forward"), (HEADS_OF_8, "qkvhc", "forward + backward")}


class Case:
    """Operands, float64 result and the call: packed, channels first, or q, k and v each (B, T, C)."""

    def __init__(self, shape: tuple[int, int, int, int], layout: str, mode: str, device: str) -> None:
        batch, self.heads, length, d = shape
        self.packed, self.order, self.trained = layout in LAYOUTS[:3], layout, mode != "forward"
        torch.manual_seed(0)
        channels = self.heads * d
        shapes = [(batch, 3 * channels, length)] if self.packed else 3 * [(batch, length, channels)]
        self.dy = torch.randn(batch, *((channels, length) if self.packed else (length, channels)), device=device)
        self.inputs = [torch.randn(size, device=device).requires_grad_(self.trained) for size in shapes]
        doubles = [x.detach().double().requires_grad_(self.trained) for x in self.inputs]
        self.expected = self.run(eager, doubles, self.dy.double()).detach()
        self.name = f"{batch}×{self.heads}×{length}×{d}, {layout}" + (f", {mode}" if self.trained else "")

    def run(self, module: Any, inputs: list[Tensor] | None = None, dy: Tensor | None = None) -> Tensor:
        inputs = self.inputs if inputs is None else inputs
        if self.packed:
            y = module.attention_qkv(inputs[0], self.heads, order=self.order)
        else:
            y = module.attention(*inputs, self.heads)
        return torch.autograd.grad(y, inputs, self.dy if dy is None else dy)[0] if self.trained else y


@pytest.mark.parametrize(("shape", "layout", "mode"), CASES, ids=str)
def test_attention(compare, device, shape, layout, mode):
    case = Case(shape, layout, mode, device)
    compare(
        "attention_qkv" if case.packed else "attention",
        case.name,
        "SDPA with its copies",
        lambda: case.run(ops),
        lambda: case.run(eager),
        check=lambda result: assert_close(case.expected)(result.detach()),
        headline=(shape, layout, mode) in HEADLINES,
        rounds=15,
    )
