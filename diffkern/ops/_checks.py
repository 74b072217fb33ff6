"""Checks of arguments' metadata: each raises an error that names the argument, what it was and what it may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, x: object, *, min_rank: int = 1) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_short(x.dtype)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.dim() < min_rank:
        raise ValueError(f"{name} must have at least {min_rank} dimensions, got shape {tuple(x.shape)}")


def check_like(name: str, x: object, other_name: str, other: Tensor, shape: Sequence[int] | None = None) -> None:
    """A floating tensor on other's device, of `shape` (other's own if not given)."""
    check_floating(name, x, min_rank=0)
    assert isinstance(x, Tensor)
    wanted = tuple(other.shape if shape is None else shape)
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name} must have shape {wanted} to go with {other_name}, got {tuple(x.shape)}")
    check_device(name, x, other_name, other)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")


def check_index(name: str, x: object, other_name: str, other: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    """An int64 tensor on other's device with one of the given shapes. Values are checked by the backends."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an int64 tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {_short(x.dtype)}")
    if tuple(x.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {tuple(x.shape)}")
    check_device(name, x, other_name, other)


def check_table(name: str, x: object, other_name: str, other: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float64, torch.float32):
        what = _short(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a float64 (or float32) tensor, got {what}")
    if x.dim() != 1 or x.shape[0] == 0:
        raise ValueError(f"{name} must have shape (T,) with T at least 1, got {tuple(x.shape)}")
    check_device(name, x, other_name, other)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
