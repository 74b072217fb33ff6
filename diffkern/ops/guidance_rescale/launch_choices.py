"""How many values of a sample are looked at side by side."""

from __future__ import annotations

from diffkern.ops._triton.elementwise import Elementwise
from diffkern.ops._triton.launch import next_power_of_2


def choose(size: int) -> Elementwise:
    """Four values a thread, of which each has five numbers in float64; a sample has one program alone."""
    elements = min(max(next_power_of_2(size), 128), 4096)
    return Elementwise(elements, max(elements // 128, 1))
