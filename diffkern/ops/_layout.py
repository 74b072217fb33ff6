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


def sample_shape(x: Tensor) -> tuple[int, int, int, bool]:
    """(samples, channels, pixels, channels_last) of a tensor of rank 1 or more."""
    if x.dim() == 1:
        return x.shape[0], 1, 1, False
    pixels = 1
    for size in x.shape[2:]:
        pixels *= size
    return x.shape[0], x.shape[1], pixels, is_channels_last(x)


def sample_dense(x: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """x with every sample dense in the wanted order, copied only if it has to be (the stride between samples is free).

    Channels last comes back as (N, *spatial, C). Only the address and stride(0) of the result are of use.
    """
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    if channels_last:
        x = x.movedim(1, -1)
    if x.is_contiguous():
        return x
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def float32_dense(x: Tensor | None, channels_last: bool) -> Tensor | None:
    """`sample_dense` for arithmetic in float32, which takes 16 bits as they are and has float64 cast; None stays."""
    return None if x is None else sample_dense(x, channels_last, torch.float32 if x.dtype == torch.float64 else None)
