"""How many values of a sample are looked at side by side."""

from __future__ import annotations

from diffkern.ops._triton.elementwise import Elementwise
from diffkern.ops._triton.launch import next_power_of_2


def choose(size: int) -> Elementwise:
    """Eight values a thread, 16 bytes in 16 bits; each has four numbers in float64. A sample has one program alone."""
    elements = min(max(next_power_of_2(size), 256), 2048)
    return Elementwise(elements, max(elements // 256, 1))
