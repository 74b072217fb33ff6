"""Closed-form, elementwise stand-ins for networks, with which the golden numbers were made."""

from __future__ import annotations

import numpy as np


def net(x: np.ndarray, t: np.ndarray, *, a: float, b: float, w: float, var: str | None = None) -> np.ndarray:
    """w·tanh(x) + (1−w)·sin(a·x + b·t + 0.1·c), c the channel, for x (N, C, H, W) and t (N,).

    var="range" appends C channels 1.2·v with v = sin(0.7·x − b·t + 0.3), a learned variance; var="log" −3 + 0.5·v, its
    logarithm.
    """
    time = np.asarray(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
    channel = np.arange(x.shape[1], dtype=x.dtype).reshape(1, -1, 1, 1)
    mean = w * np.tanh(x) + (1 - w) * np.sin(a * x + b * time + 0.1 * channel)
    if var is None:
        return mean
    v = np.sin(0.7 * x - b * time + 0.3)
    return np.concatenate([mean, {"range": 1.2 * v, "log": -3 + 0.5 * v}[var]], axis=1)
