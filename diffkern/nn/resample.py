"""Halving and doubling the resolution of a feature map."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["symmetric", "tf_same"]


def upsample_nearest(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W), each pixel four times; the memory format is kept."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Upsample(nn.Module):
    """Nearest neighbour ×2, then a 3×3 convolution: (N, C, H, W) -> (N, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x))


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2: (N, C, H, W) -> (N, C, H/2, W/2), for even H and W.

    padding: "symmetric", one pixel on every side; or "tf_same", one pixel on the right and at the bottom, which is
    what TensorFlow's SAME means for an even size: the original DDPM, and checkpoints ported from it.
    """

    def __init__(self, channels: int, padding: Padding = "symmetric") -> None:
        super().__init__()
        if padding not in get_args(Padding):
            raise ValueError(f"padding must be one of {get_args(Padding)}, not {padding!r}")
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if padding == "symmetric" else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding == "symmetric" else F.pad(x, (0, 1, 0, 1)))
