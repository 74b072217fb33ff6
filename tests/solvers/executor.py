"""A StepProgram executed in float64 NumPy, straight from the formula: what programs are judged by here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffkern.solvers import StepProgram, columns


class Step(NamedTuple):
    x: np.ndarray
    mean: np.ndarray  # x without its noise
    x0: np.ndarray
    log_variance: np.ndarray | None  # None where σ = 1


def execute(
    program: StepProgram,
    row: int,
    x: np.ndarray,
    output: np.ndarray,
    noise: np.ndarray | None = None,
    slots: np.ndarray | None = None,
) -> Step:
    """One row of a program without thresholding or input scaling; x (N, C, …), output (N, C or 2C, …).

    `noise` may be missing where the program makes none. `slots` (S, N, C, …) are written; those of a new run hold NaN.
    """
    assert program.threshold is None
    assert not program.scales_input
    history = [] if slots is None else list(slots.copy())
    assert len(history) == program.num_slots
    c = {name: program.column(name)[row] for name in columns(program.num_slots)}
    m, log_variance, sigma = output[:, : x.shape[1]], None, np.float64(1)
    if program.variance == "learned_range":
        assert output.shape[1] == 2 * x.shape[1]
        fraction = (output[:, x.shape[1] :] + 1) / 2
        log_variance = fraction * c["log_var_max"] + (1 - fraction) * c["log_var_min"]
    elif program.variance == "learned":
        log_variance = output[:, x.shape[1] :]
    if log_variance is not None:
        sigma = np.exp(0.5 * log_variance)
    x0 = c["a_x"] * x + c["a_m"] * m
    if program.clip is not None:
        x0 = np.clip(x0, *program.clip)

    def combine(family: str) -> np.ndarray:
        total = _term(c[f"{family}_x"], x) + _term(c[f"{family}_m"], m) + _term(c[f"{family}_0"], x0)
        return total + sum(_term(c[f"{family}_h{k}"], h) for k, h in enumerate(history))

    mean = combine("c")
    for j, k in enumerate(program.writes[row]):
        if k >= 0:
            assert slots is not None
            slots[k] = combine(f"g{j}")
    return Step(mean if noise is None else mean + c["c_z"] * sigma * noise, mean, x0, log_variance)


def new_slots(program: StepProgram, x: np.ndarray) -> np.ndarray | None:
    """What a run from x begins with: slots that nobody has written."""
    return np.full((program.num_slots, *x.shape), np.nan) if program.num_slots else None


def _term(coefficient: np.float64, operand: np.ndarray) -> np.ndarray:
    return coefficient * operand if coefficient else np.zeros_like(operand)


def trajectory(program: StepProgram, network: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray) -> np.ndarray:
    """The states (R, N, C, …) after each row of a program without noise; network(x, time)."""
    slots, states = new_slots(program, x), []
    for row, time in enumerate(program.times):
        x = execute(program, row, x, network(x, time), slots=slots).x
        states.append(x)
    return np.array(states)
