"""Chains of levels in every scale of x, and runs through them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from diffkern.solvers import StepProgram, Transitions, chain
from tests.golden_data import Golden
from tests.solvers.executor import execute, new_slots
from tests.stub_networks import net

SCALES = ("exploding", "preserving", "flow")
LINEAR_LEVELS = np.append(np.linspace(20.0, 0.5, 9), 0.0)  # of σ̂ = σ/α


def scaled(scale: str, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """α and σ of levels σ̂ in a scale of x: (1, σ̂), α² + σ² = 1, or α + σ = 1."""
    alpha = {"exploding": np.ones_like(levels), "preserving": 1 / np.sqrt(1 + levels**2), "flow": 1 / (1 + levels)}[
        scale
    ]
    return alpha, alpha * levels


def data(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A state y = x/α at the first level (2, 3, 4, 4), and noise for each step."""
    generator = np.random.default_rng(0)
    return levels[0] * generator.standard_normal((2, 3, 4, 4)), generator.standard_normal((len(levels), 2, 3, 4, 4))


def exploding_chain(sigmas: np.ndarray) -> Transitions:
    """Through x = x0 + σ·ε; the network is given σ and predicts x0."""
    return chain(np.ones_like(sigmas), sigmas, sigmas[:-1], "x0")


def k_diffusion(golden: Golden, case: str) -> tuple[Callable[[np.ndarray, float], np.ndarray], np.ndarray, np.ndarray]:
    """The denoiser(x, σ) of a stored case of k-diffusion, its first x and its σ."""
    stub = functools.partial(net, **{k: golden.meta["stub"][k] for k in "abw"})
    sigmas, x = (golden[f"{case}/{name}"].astype(np.float64) for name in ("sigmas", "x_init"))
    return lambda x, s: stub(x / np.sqrt(1 + s**2), np.full(len(x), np.log(s))), x, sigmas


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
