"""Chains of levels in every scale of x, and runs through them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffkern.solvers import StepProgram
from tests.solvers.executor import execute, new_slots

SCALES = ("exploding", "preserving", "flow")
LINEAR_LEVELS = np.append(np.linspace(20.0, 0.5, 9), 0.0)  # of σ̂ = σ/α


def scaled(scale: str, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """α and σ of levels σ̂ in a scale of x: (1, σ̂), α² + σ² = 1, or α + σ = 1."""
    alpha = {"exploding": np.ones_like(levels), "preserving": 1 / np.sqrt(1 + levels**2), "flow": 1 / (1 + levels)}[scale]
    return alpha, alpha * levels


def data(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A state y = x/α at the first level (2, 3, 4, 4), and noise for each step."""
    generator = np.random.default_rng(0)
    return levels[0] * generator.standard_normal((2, 3, 4, 4)), generator.standard_normal((len(levels), 2, 3, 4, 4))


def run(
    program: StepProgram,
    network: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
    noise: np.ndarray | None = None,
) -> np.ndarray:
    """The states (R, N, C, …) after each row, in float64; NaN stands for the output of a network that is not called."""
    slots, states = new_slots(program, x), []
    for row in range(program.num_rows):
        output = network(x, program.times[row]) if program.calls_network[row] else np.full_like(x, np.nan)
        drawn = noise[row] if noise is not None else None
        x = execute(program, row, x, output, drawn, slots).x
        states.append(x)
    return np.array(states)
