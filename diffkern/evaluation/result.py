"""The bound of a data set, with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class NllResult:
    """The terms of the bound for N images and T timesteps, in bits/dim, and what they sum up to.

    Attributes:
        vb: float32 (N, T), L_0 (the decoder's) at t = 0 and the KL terms after it.
        mse: float32 (N, T), the network's mean squared error against its target.
        x0_mse: float32 (N, T), that of the x̂0 (clipped, if the evaluation clips) which the mean is made from.
        prior: float64 (N,), L_T.
        timesteps: (T,), what the network was given at each t.
        settings: all that decided the result.
    """

    vb: np.ndarray
    mse: np.ndarray
    x0_mse: np.ndarray
    prior: np.ndarray
    timesteps: np.ndarray
    settings: dict[str, Any]

    @property
    def total(self) -> np.ndarray:
        """The bound of each image, float64 (N,)."""
        return self.prior + self.vb.sum(axis=1, dtype=np.float64)

    @property
    def bits_per_dim(self) -> float:
        """The mean over the images."""
        return float(self.total.mean())

    @property
    def standard_error(self) -> float:
        """Of `bits_per_dim`, from the spread over the images, each with its own noise; NaN for a single image."""
        return float(_standard_error(self.total))

    @property
    def confidence(self) -> tuple[float, float]:
        """95 % confidence interval of `bits_per_dim` for images like these, from the normal distribution.

        With fewer than some thirty images it is too narrow.
        """
        half = _NORMAL_95 * self.standard_error
        return self.bits_per_dim - half, self.bits_per_dim + half

    @property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean of `vb` over the images, and its standard error, float64 (T,)."""
        return self.vb.mean(axis=0, dtype=np.float64), _standard_error(self.vb.astype(np.float64))

    def to_json(self) -> dict[str, Any]:
        """Means, errors, curves and settings as values that JSON knows; NaN, for one image's errors, becomes None."""
        mean, error = self.curve
        return {
            "bits_per_dim": self.bits_per_dim,
            "standard_error": _finite(self.standard_error),
            "confidence_95": [_finite(end) for end in self.confidence],
            "prior": float(self.prior.mean()),
            "decoder": float(mean[0]),
            "kl": float(mean[1:].sum()),
            "images": len(self.prior),
            "timesteps": self.timesteps.tolist(),
            "vb": mean.tolist(),
            "vb_standard_error": [_finite(value) for value in error.tolist()],
            "mse": self.mse.mean(axis=0, dtype=np.float64).tolist(),
            "x0_mse": self.x0_mse.mean(axis=0, dtype=np.float64).tolist(),
            "settings": self.settings,
        }


def _standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis; NaN for one value."""
    count = len(values)
    if count == 1:
        return np.full(values.shape[1:], np.nan)
    return values.std(axis=0, ddof=1) / math.sqrt(count)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
