"""What a run minimises, from its configuration, its process and its data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffkern.process import GaussianProcess, loss_weights
from diffkern.training.config import TrainConfig
from diffkern.training.learned_schedule import LearnedSchedule

_PURE_BOUND = ("kl", "rescaled_kl")


@dataclass(frozen=True)
class Objective:
    """Every choice that changes the loss, with no default left open.

    Attributes:
        prediction, variance: of the process.
        loss: as in ``diffusion_loss``; "continuous_bound" for a ``LearnedSchedule``.
        levels: grey levels of the data, which the bound's first term needs.
        weighting: a name in ``process.WEIGHTINGS`` or None, with ``weighting_options``.
        offset_noise: standard deviation of the noise that each channel has in common, beside ε's own 1.
        self_conditioning: share of the optimiser steps in which the network is given its own x0.
    """

    prediction: str
    variance: str
    loss: str
    levels: int
    weighting: str | None
    weighting_options: dict[str, float]
    offset_noise: float
    self_conditioning: float

    def weights(self, process: GaussianProcess) -> np.ndarray | None:
        """float64 (T,), or None for a loss without a weighting."""
        return None if self.weighting is None else loss_weights(process, self.weighting, **self.weighting_options)

    def describe(self) -> dict[str, Any]:
        """The attributes as values that a checkpoint holds."""
        return asdict(self)


def objective_before(process: GaussianProcess, levels: int) -> Objective:
    """That of a checkpoint from the time when there was no choice: the squared error, of which levels are no part."""
    return Objective(process.prediction, process.variance, "mse", levels, None, {}, 0.0, 0.0)


def make_objective(
    config: TrainConfig, process: GaussianProcess | LearnedSchedule, *, levels: int, takes_self_cond: bool
) -> Objective:
    """The objective of a run on data of ``levels`` grey levels.

    ``takes_self_cond``: whether the network takes x_self_cond.

    Raises:
        ValueError: choices that do not go together; names them.
    """
    if isinstance(process, LearnedSchedule):
        return _continuous(config, process, levels, takes_self_cond)
    learned = process.channel_variance != "fixed"
    loss = config.loss or ("rescaled_mse" if learned else "mse")
    if learned and loss == "mse":
        raise ValueError(
            f"loss='mse' does not train the variance that a process with variance={process.variance!r} learns: "
            "use 'rescaled_mse', 'hybrid', 'kl' or 'rescaled_kl', or a fixed variance"
        )
    if loss in _PURE_BOUND:
        for name, given in (("weighting", config.weighting), ("offset_noise", config.offset_noise)):
            if given:
                raise ValueError(
                    f"{name}={given!r} and loss={loss!r}: the bound has weights and noise of its own; "
                    f"use another loss, or no {name}"
                )
    reaches_x0 = np.isfinite(process.conversion(process.prediction, "x0")).all()
    if (learned or loss in _PURE_BOUND) and not reaches_x0:
        raise ValueError(
            f"loss={loss!r} and prediction={process.prediction!r}: the bound is infinite where ᾱ is 0; "
            "predict 'v' or 'x0'"
        )
    if takes_self_cond != (config.self_conditioning > 0):
        raise ValueError(
            f"self_conditioning={config.self_conditioning} and a model {'with' if takes_self_cond else 'without'} "
            "self_condition: switch on both or neither"
        )
    if takes_self_cond and not reaches_x0:
        raise ValueError(
            f"self_conditioning={config.self_conditioning} and prediction={process.prediction!r}: "
            "there is no x0 to be had from it where ᾱ is 0; predict 'v' or 'x0'"
        )
    objective = Objective(
        process.prediction,
        process.variance,
        loss,
        config.levels or levels,
        config.weighting,
        config.weighting_options,
        config.offset_noise,
        config.self_conditioning,
    )
    objective.weights(process)  # raises for options that the weighting does not have, and for infinite weights
    return objective


def _continuous(config: TrainConfig, process: LearnedSchedule, levels: int, takes_self_cond: bool) -> Objective:
    """A learned schedule has one loss, the bound in continuous time, with weights and noise of its own."""
    for name in ("loss", "weighting", "offset_noise", "self_conditioning"):
        if getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} and a learned schedule: it is trained on the bound in continuous "
                f"time, without {name}"
            )
    if takes_self_cond:
        raise ValueError("a model with self_condition and a learned schedule: it is trained without self-conditioning")
    levels = config.levels or levels
    return Objective(process.prediction, process.variance, "continuous_bound", levels, None, {}, 0.0, 0.0)
