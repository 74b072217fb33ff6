"""What the layouts of attention have in common: queries, keys and values as strided views (B, heads, T, d)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._layout import empty_with_channels

ORDERS = ("hqkvc", "qkvhc", "hcqkv")


def by_head(x: Tensor, num_heads: int, channels_last: bool) -> Tensor:
    """The view (B, heads, T, d) of [B, T, heads·d], or of [B, heads·d, T]."""
    if channels_last:
        return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)
    return x.unflatten(1, (num_heads, x.shape[1] // num_heads)).transpose(2, 3)


def separate(q: Tensor, k: Tensor, v: Tensor, num_heads: int, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The views of three tensors."""
    return (
        by_head(q, num_heads, channels_last),
        by_head(k, num_heads, channels_last),
        by_head(v, num_heads, channels_last),
    )


def packed(qkv: Tensor, num_heads: int, order: str, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The views (B, heads, T, d) of q, k and v in [B, T, 3·heads·d], or in [B, 3·heads·d, T]."""
    rows = qkv if channels_last else qkv.transpose(1, 2)
    channels = rows.shape[2] // (3 * num_heads)
    if order == "hqkvc":
        q, k, v = rows.unflatten(2, (num_heads, 3, channels)).unbind(3)
    elif order == "qkvhc":
        q, k, v = rows.unflatten(2, (3, num_heads, channels)).unbind(2)
    else:
        q, k, v = rows.unflatten(2, (num_heads, channels, 3)).unbind(4)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def out_like(x: Tensor, channels: int, channels_last: bool) -> Tensor:
    """An empty tensor like x, of `channels` channels: channels innermost in memory where x has them there."""
    if channels_last:
        return empty_with_channels(x.transpose(1, 2), channels).transpose(1, 2)
    return empty_with_channels(x, channels)


def accumulated_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_lse(q: Tensor, with_lse: bool) -> Tensor:
    """Room for the rows' log-sum-exp (B, heads, T) of the view q, or an empty tensor if nobody wants it."""
    return q.new_empty(q.shape[:3] if with_lse else (0,), dtype=accumulated_in(q))
