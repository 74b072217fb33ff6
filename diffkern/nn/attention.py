"""Self-attention over the pixels of a feature map, with its norm, its projections and its residual."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from diffkern.nn.init import zero_init
from diffkern.nn.norm import GroupNorm
from diffkern.ops import attention_qkv

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
        return x + self.proj(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v of GN(x), (N, C, H, W), from the projection as it lies in memory."""
        qkv = self.qkv(self.norm(x)).flatten(2)
        return attention_qkv(qkv, self.num_heads, order=self.order).unflatten(2, x.shape[2:])
