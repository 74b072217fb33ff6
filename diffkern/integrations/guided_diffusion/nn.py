"""What of the replaced package's `nn` module its diffusion classes are written with."""

from __future__ import annotations

from torch import Tensor


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all axes but the first: (N,) of (N, …)."""
    return tensor.mean(dim=tuple(range(1, tensor.dim()))) if tensor.dim() > 1 else tensor
