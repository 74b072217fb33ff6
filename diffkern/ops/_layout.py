"""Memory formats as the ops see them: contiguous, or channels last in any rank."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, *spatial) lies in memory as (N, *spatial, C) and not also as contiguous."""
    return x.dim() >= 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def in_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory order of `like` (which is dense, of the same rank), copied only if it has to be."""
    if is_channels_last(like):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def empty_like_layout(x: Tensor, dtype: torch.dtype | None = None, channels: int | None = None) -> Tensor:
    """An empty tensor in x's memory format (contiguous if x has neither), optionally with another channel count."""
    shape = list(x.shape)
    if channels is not None:
        shape[1] = channels
    dtype = x.dtype if dtype is None else dtype
    if is_channels_last(x):
        moved = [shape[0], *shape[2:], shape[1]]
        return torch.empty(moved, dtype=dtype, device=x.device).movedim(-1, 1)
    return torch.empty(shape, dtype=dtype, device=x.device)
