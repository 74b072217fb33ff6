"""Gathers by an index whose values nobody has checked yet, and their gradient."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from diffkern.ops._layout import flat_samples


def check_values(name: str, index: Tensor, size: int) -> None:
    """Raises ValueError for an index outside [0, size) where looking costs nothing.

    That is on a CPU, and anywhere with DIFFKERN_DEBUG=1. Only for backends: a trace cannot look.
    """
    if index.device.type != "cpu" and os.environ.get("DIFFKERN_DEBUG") != "1":
        return
    if index.numel() == 0:
        return
    low, high = torch.aminmax(index)
    if int(low) < 0 or int(high) >= size:
        valid = (index >= 0) & (index < size)
        position = int((~valid).reshape(-1).nonzero()[0, 0])
        value = int(index.reshape(-1)[position])
        raise ValueError(f"{name} must lie in [0, {size}), got {value} at position {position}")


def gather(table: Tensor, index: Tensor) -> Tensor:
    """table[index] along the first axis, in float64; NaN where the index is out of range. Never waits for the host."""
    size = table.size(0)  # not table.shape[0]: under compile with dynamic sizes a constant table has no `shape`
    valid = (index >= 0) & (index < size)
    # index_select, because indexing by a 0-d tensor would read its value on the host.
    rows = table.double().index_select(0, index.clamp(0, size - 1).reshape(-1))
    rows = rows.reshape(index.shape + rows.shape[1:])
    return torch.where(valid.reshape(valid.shape + (1,) * (rows.dim() - valid.dim())), rows, torch.nan)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N,) or () to a shape that broadcasts over like's (N, C, …)."""
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim())) if values.dim() else values


def table_gradient(table: Tensor, t: Tensor, grad: Tensor, factor: Tensor) -> Tensor:
    """The gradient of `table` where table[t]·factor was computed and `grad` arrives.

    At each t the sum of <grad, factor> over its samples, in float64 and in the order of the samples.
    """
    products = flat_samples(grad.double() * factor.double()).sum(1)
    members = t.unsqueeze(0) == torch.arange(table.shape[0], device=t.device).unsqueeze(1)
    return torch.where(members, products, 0.0).sum(1).to(table.dtype)
