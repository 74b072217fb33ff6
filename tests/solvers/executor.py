"""A StepProgram executed in float64 NumPy, straight from the formula: what programs are judged by here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffkern.solvers import StepProgram


class Step(NamedTuple):
    x: np.ndarray
    mean: np.ndarray  # x without its noise
    x0: np.ndarray
    log_variance: np.ndarray | None  # None where σ = 1


def execute(program: StepProgram, row: int, x: np.ndarray, output: np.ndarray, noise: np.ndarray) -> Step:
    """One row of a program without slots, thresholding or input scaling; x (N, C, …), output (N, C or 2C, …)."""
    assert program.num_slots == 0
    assert program.threshold is None
    assert not program.scales_input
    c = {
        name: program.column(name)[row]
        for name in ("a_x", "a_m", "c_x", "c_m", "c_0", "c_z", "log_var_min", "log_var_max")
    }
    m, log_variance, sigma = output[:, : x.shape[1]], None, np.float64(1)
    if program.variance == "learned_range":
        assert output.shape[1] == 2 * x.shape[1]
        fraction = (output[:, x.shape[1] :] + 1) / 2
        log_variance = fraction * c["log_var_max"] + (1 - fraction) * c["log_var_min"]
        sigma = np.exp(0.5 * log_variance)
    x0 = c["a_x"] * x + c["a_m"] * m
    if program.clip is not None:
        x0 = np.clip(x0, *program.clip)
    mean = c["c_x"] * x + c["c_m"] * m + c["c_0"] * x0
    return Step(mean + c["c_z"] * sigma * noise, mean, x0, log_variance)
