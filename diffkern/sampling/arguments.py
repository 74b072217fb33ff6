"""What a sampler's caller gives it, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Labels = Tensor | Sequence[int]


def check_labels(labels: Labels, n: int, num_classes: int | None, null_label: int | None) -> Tensor:
    """`labels` as int64 (n,); ValueError unless they are n integers below num_classes, or null_label."""
    y = torch.as_tensor(labels)
    if y.shape != (n,) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels are {y.dtype} of shape {tuple(y.shape)}; they must be integers of shape ({n},)")
    y = y.to(torch.int64)
    allowed = y >= 0
    if num_classes is not None:
        allowed &= (y < num_classes) | (y == null_label)
    if not allowed.all():
        limit = "0 or more" if num_classes is None else f"in [0, {num_classes})"
        raise ValueError(f"labels must be {limit}; one is {int(y[~allowed][0])}")
    return y


def check_tensor(name: str, returned: object) -> None:
    """TypeError unless what the function called `name` returned is a tensor."""
    if not isinstance(returned, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(returned).__name__}")


def check_timestep(t: int, num_timesteps: int) -> None:
    """ValueError unless t is an int in [0, num_timesteps)."""
    if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < num_timesteps:
        raise ValueError(f"t is {t!r}; it must be an int in [0, {num_timesteps})")


def check_images(name: str, images: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless `images` are floating point of shape (n, *shape)."""
    if images.ndim != 1 + len(shape) or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise ValueError(
            f"{name} is {images.dtype} of shape {tuple(images.shape)}; "
            f"it must be floating point of shape (n, {', '.join(map(str, shape))})"
        )
