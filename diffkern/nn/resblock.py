"""The residual block of DDPM (Ho et al. 2020) with the changes of improved- and guided-diffusion."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.nn.init import zero_init
from diffkern.nn.norm import GroupNorm
from diffkern.nn.resample import upsample_nearest

Resample = Literal["up", "down"]


class ResBlock(nn.Module):
    """skip(x) + conv2(dropout(silu(GN(h)))), with h = conv1(silu(GN(x))) and the time embedding entering at h.

    in_channels, out_channels: where they differ the skip is a 1×1 convolution, otherwise the identity.
    emb_channels: E of the embedding.
    scale_shift: the embedding scales and shifts the second norm, GN(h)·(1 + scale) + shift ("AdaGN", Dhariwal &
        Nichol 2021, §3); otherwise its projection is added to h.
    resample: "up" (nearest ×2) or "down" (2×2 mean), on both branches, on the main one between SiLU and conv1.

    ``conv2`` starts at zero, so that a fresh block is its skip.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        num_groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        if resample is not None and resample not in get_args(Resample):
            raise ValueError(f"resample must be None or one of {get_args(Resample)}, not {resample!r}")
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = GroupNorm(num_groups, in_channels, eps, activation="silu")
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels, eps, activation="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x`` (N, in, H, W); ``emb`` (N, E), already through its SiLU: it is the same for every block of a network.

        Returns (N, out, H', W') in x's memory format.
        """
        h = self.conv1(self._resampled(self.norm1(x)))
        return self.skip(self._resampled(x)) + self.second_half(h, emb)

    def second_half(self, h: Tensor, emb: Tensor) -> Tensor:
        """From the first convolution's output to the second's."""
        if self.scale_shift:
            scale, shift = self.emb_proj(emb).chunk(2, dim=1)
            h = self.norm2(h, scale, shift)
        else:
            h = self.norm2(h, offset=self.emb_proj(emb))
        return self.conv2(self.dropout(h))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return upsample_nearest(x) if self.resample == "up" else F.avg_pool2d(x, 2)
