"""How a step is cut into programs."""

from __future__ import annotations

from torch import Tensor

from diffkern.ops._triton import elementwise
from diffkern.ops._triton.launch import INTERPRETED


def choose(x: Tensor, num_slots: int) -> elementwise.Elementwise:
    """As for any pass over elements; smaller with more slots than three, of which sixteen a thread are all it can hold.

    With eight, guidance, noise and a learned variance 2048 elements spill, and 1024 take 184 registers.
    """
    chosen = elementwise.choose(x.numel(), x.device)
    if num_slots > 3 and chosen.elements > 1024 and not INTERPRETED:
        return elementwise.Elementwise(1024, 4)
    return chosen
