"""How many values of a sample are looked at side by side."""

from __future__ import annotations

from diffkern.ops._triton.elementwise import Elementwise
from diffkern.ops._triton.launch import next_power_of_2


def choose(size: int) -> Elementwise:
    """Eight values a thread: a sample has one program alone, and each of its histograms ends with a barrier."""
    elements = min(max(next_power_of_2(size), 256), 8192)
    return Elementwise(elements, max(elements // 256, 1))
