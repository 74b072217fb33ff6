"""How a step is cut into programs."""

from __future__ import annotations

from torch import Tensor

from diffkern.ops._triton import elementwise


def choose(x: Tensor, num_slots: int) -> elementwise.Elementwise:
    return elementwise.choose(x.numel(), x.device)
