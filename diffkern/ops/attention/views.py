"""What the layouts of attention have in common: queries, keys and values as strided views (B, heads, T, d)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from diffkern.ops._layout import is_channels_last

P = ParamSpec("P")
R = TypeVar("R")

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
    """An empty tensor like x, of `channels` channels: contiguous, or with the axes turned as x has them in memory."""
    batch, length = x.shape[0], x.shape[1 if channels_last else 2]
    inner, outer = (channels, length) if channels_last else (length, channels)
    if is_channels_last(x):
        return x.new_empty((batch, inner, outer)).transpose(1, 2)
    return x.new_empty((batch, outer, inner))


def accumulated_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_lse(q: Tensor, with_lse: bool) -> Tensor:
    """Room for the rows' log-sum-exp (2, B, heads, T) of the view q, or an empty tensor if nobody wants it.

    It is the sum of two numbers, the largest score, rounded, and the rest: far from 0 one number would round the rest
    away. (−inf, 0) where all scores are −inf.
    """
    return q.new_empty((2, *q.shape[:3]) if with_lse else (0,), dtype=accumulated_in(q))


def without_autocast(computation: Callable[P, R]) -> Callable[P, R]:
    """`computation`, its matrix products in the dtype of their operands also under autocast."""

    @functools.wraps(computation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if not torch.amp.is_autocast_available(device):
            return computation(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return computation(*args, **kwargs)

    return run
