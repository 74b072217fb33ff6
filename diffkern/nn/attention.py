"""Self-attention over the pixels of a feature map, with its norm, its projections and its residual."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.nn.init import zero_init
from diffkern.nn.norm import GroupNorm

QKVOrder = Literal["hqkvc", "qkvhc", "hcqkv"]


class Attention(nn.Module):
    """x + proj(softmax(q kᵀ / √d) v), with q, k, v packed in one 1×1 projection of GN(x).

    channels: C of the input and the output.
    num_heads, num_head_channels: heads, or channels per head d, which then decides.
    order: how the 3C channels of the packed projection are read, slowest index first:

    - "hqkvc": [head][q|k|v][channel], improved-diffusion and guided-diffusion's legacy order;
    - "qkvhc": [q|k|v][head][channel], guided-diffusion's new order and lucidrains;
    - "hcqkv": [head][channel][q|k|v], EDM.

    ``proj`` starts at zero, so that a fresh block is the identity. Raises ``ValueError`` for an unknown order and
    for channels that the heads do not divide.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        num_head_channels: int | None = None,
        order: QKVOrder = "hqkvc",
        num_groups: int = 32,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if order not in get_args(QKVOrder):
            raise ValueError(f"order must be one of {get_args(QKVOrder)}, not {order!r}")
        if num_head_channels is None:
            if channels % num_heads:
                raise ValueError(f"num_heads = {num_heads} does not divide the {channels} channels")
        else:
            if channels % num_head_channels:
                raise ValueError(f"num_head_channels = {num_head_channels} does not divide the {channels} channels")
            num_heads = channels // num_head_channels
        self.num_heads = num_heads
        self.order = order
        self.norm = GroupNorm(num_groups, channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), in x's memory format."""
        qkv = self.qkv(self.norm(x))
        q, k, v = split_qkv(qkv.flatten(2).transpose(1, 2), self.num_heads, self.order)
        out = F.scaled_dot_product_attention(_by_head(q), _by_head(k), _by_head(v))
        out = out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
        # SDPA leaves the channels innermost: said here, or the convolution after it would turn its output over too.
        return x + self.proj(out.contiguous(memory_format=_memory_format(qkv)))


def split_qkv(qkv: Tensor, num_heads: int, order: QKVOrder) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each (N, T, heads, d), into a packed (N, T, 3·heads·d) of any stride."""
    if order == "hqkvc":
        q, k, v = qkv.unflatten(2, (num_heads, 3, -1)).unbind(3)
    elif order == "qkvhc":
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
    else:
        q, k, v = qkv.unflatten(2, (num_heads, -1, 3)).unbind(4)
    return q, k, v


def _by_head(part: Tensor) -> Tensor:
    """(N, T, heads, d) -> (N, heads, T, d). A copy where d is strided, which SDPA's fused kernels do not take."""
    part = part.transpose(1, 2)
    return part if part.stride(-1) == 1 else part.contiguous()


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
