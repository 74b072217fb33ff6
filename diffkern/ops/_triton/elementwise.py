"""Launches of kernels that go over the elements of samples: how they are cut into tiles, and from where they draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._layout import sample_shape
from diffkern.ops._torch_draws import TorchDraws
from diffkern.ops._triton.launch import INTERPRETED, cdiv, multiprocessors, next_power_of_2

LINEAR, PIXELS, SINGLE, TORCH = 0, 1, 2, 3  # of tile.py


SampleShape = tuple[int, int, int, bool]  # as sample_shape gives it


@dataclass(frozen=True)
class Elementwise:
    """elements: of a tile, a power of two. num_warps: of a program."""

    elements: int
    num_warps: int


def choose(numel: int, device: torch.device) -> Elementwise:
    """Four counters in flight a thread where that leaves every multiprocessor enough programs, else fewer.

    Interpreted, a program costs the same whatever its size.
    """
    if INTERPRETED and numel >= 2**16:
        return Elementwise(2**15, 4)
    for elements in (2048, 1024):
        if numel >= 4 * elements * multiprocessors(device):
            return Elementwise(elements, 4)
    return Elementwise(512, 4)


@dataclass(frozen=True)
class Tiling:
    """How the samples of a tensor are cut: `arguments` are those of tile.place, `programs` the size of the grid."""

    programs: int
    num_warps: int
    arguments: dict[str, Any]


def tiling(x: Tensor, generates: bool, chosen: Elementwise | None = None) -> Tiling:
    """For operands in x's memory order; `generates` says whether the kernel makes noise, which has a logical order."""
    return shape_tiling(sample_shape(x), generates, chosen or choose(x.numel(), x.device))


def shape_tiling(shape: SampleShape, generates: bool, chosen: Elementwise) -> Tiling:
    """The same for a tensor of this shape and memory order."""
    samples, channels, pixels, channels_last = shape
    size = channels * pixels
    order, width = LINEAR, 1
    blocks = cdiv(size, chosen.elements)
    if generates and channels_last:
        order = PIXELS if pixels % 4 == 0 else SINGLE
        if order == PIXELS:
            width = min(next_power_of_2(channels), 8)
            blocks = cdiv(channels, width) * cdiv(pixels // 4, chosen.elements // 4 // width)
    arguments: dict[str, Any] = {
        "blocks": blocks,
        "size": size,
        "channels": channels,
        "pixels": pixels,
        "BLOCK": chosen.elements,
        "ORDER": order,
        "WIDTH": width,
    }
    return Tiling(samples * blocks, chosen.num_warps, arguments)


def torch_tiling(x: Tensor, draws: TorchDraws, chosen: Elementwise | None = None) -> Tiling:
    """For normals as torch draws them on a GPU for a dense x, contiguous or channels last."""
    _, channels, pixels, _ = sample_shape(x)
    chosen = chosen or choose(x.numel(), x.device)
    blocks = cdiv(draws.threads, chosen.elements // 4)
    arguments: dict[str, Any] = {
        "blocks": blocks,
        "size": channels * pixels,
        "channels": draws.threads,
        "pixels": x.numel(),
        "BLOCK": chosen.elements,
        "ORDER": TORCH,
        "WIDTH": 1,
    }
    return Tiling(cdiv(x.numel(), 4 * draws.threads) * blocks, chosen.num_warps, arguments)


def torch_arguments(draws: TorchDraws) -> dict[str, Any]:
    """Those of tile.normals for the same."""
    return {
        "seed": draws.seed,
        "draw": draws.call,
        "samples": None,
        "stream": 0,
        "DRAWS": False,
        "SAMPLES": False,
    }


def counter_arguments(seed: Tensor | None, draw: Tensor | None, samples: Tensor | None, stream: int) -> dict[str, Any]:
    """Those of tile.normals; all None where no noise is made."""
    if seed is None or draw is None or samples is None:
        return {"seed": None, "draw": None, "samples": None, "stream": stream, "DRAWS": False, "SAMPLES": False}
    return {
        "seed": seed,
        "draw": draw.contiguous(),
        "samples": samples.contiguous(),
        "stream": stream,
        "DRAWS": draw.dim() > 0,
        "SAMPLES": samples.dim() > 0,
    }
