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


def flat_samples(x: Tensor) -> Tensor:
    """x (N, …) as (N, values of a sample), also where a sample is a single value or empty."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def empty_with_channels(x: Tensor, channels: int) -> Tensor:
    """An empty (N, channels, …) in the memory format that `empty_like_layout(x)` has."""
    samples, _, *spatial = x.shape
    if is_channels_last(x):
        return x.new_empty((samples, *spatial, channels)).movedim(-1, 1)
    return x.new_empty((samples, channels, *spatial))


def empty_like_layout(x: Tensor, device: str | None = None) -> Tensor:
    """An empty tensor in x's memory format, or contiguous if x has neither; on x's device unless one is given."""
    if x.is_contiguous() or is_channels_last(x):
        return torch.empty_like(x, device=device)
    return torch.empty(x.shape, dtype=x.dtype, device=device or x.device)
