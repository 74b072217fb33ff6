"""Halving and doubling the resolution of a feature map."""

from __future__ import annotations

from typing import Literal, get_args

import torch
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


# Row m of a 4×4 kernel of stride 2 is the sum of the rows k of the 3×3 kernel that meet the same pixel of the small
# image, since nearest-neighbour ×2 shows each pixel twice: m = u − k + 2 for the first and the second, u = 0, 1.
_ROWS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))
_FOLDS_FROM = 256  # pixels of the small images together; below, making the kernel costs more than it saves


def can_fold(conv: nn.Conv2d) -> bool:
    """Whether a convolution after nearest-neighbour ×2 is of the kind that `upsample_conv` computes."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(nearest ×2 of x, weight, bias, padding=1) as a transposed convolution of x with a 4×4 kernel, stride 2.

    x: (N, C, H, W). weight: (O, C, 3, 3). bias: (O,) or None. Returns (N, O, 2H, 2W) in x's memory format, equal but
    for rounding: the sums of weights are made once, in float32 or wider. 16 multiplications for every four results
    instead of 36. Gradients flow to all three. Where the images are so small that the kernel costs more than it saves,
    the two steps are done as they stand.
    """
    if x.shape[0] * x.shape[2] * x.shape[3] < _FOLDS_FROM:
        return F.conv2d(upsample_nearest(x), weight, bias, padding=1)
    y = F.conv_transpose2d(x, _folded(weight), bias, stride=2, padding=1)
    return y.contiguous() if x.is_contiguous() else y


def _folded(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (C, O, 4, 4), as a transposed convolution takes it.

    Channels last, which oneDNN's transposed convolution takes two thirds of the time with, whatever the image's format.
    """
    out, channels = weight.shape[:2]
    wide = weight.float() if weight.dtype.itemsize < 4 else weight
    rows = torch.tensor(_ROWS, dtype=wide.dtype, device=wide.device)
    with torch.autocast(weight.device.type, enabled=False):
        kernel = torch.kron(rows, rows) @ wide.permute(2, 3, 1, 0).reshape(9, -1)
    kernel = kernel.to(weight.dtype).view(4, 4, channels, out).permute(2, 3, 0, 1)
    if min(out, channels) == 1:  # then both formats at once, of which torch's float64 backward pass takes the wrong one
        return kernel.contiguous()
    return kernel.contiguous(memory_format=torch.channels_last)
