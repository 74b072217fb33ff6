"""Which timesteps to train at: uniformly drawn ones, or more of those whose losses were large (Nichol & Dhariwal 2021).

A batch drawn with probabilities p_t has weights 1/(T·p_t), which make the weighted mean of its losses an unbiased
estimate of the uniform one (arXiv 2102.09672, section 3.3).
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def create_named_schedule_sampler(name: str, diffusion: Any) -> ScheduleSampler:
    """The sampler called `name`, "uniform" or "loss-second-moment", of diffusion's timesteps; else ValueError."""
    if name not in _SAMPLERS:
        raise ValueError(f"name is {name!r}; it may be one of {', '.join(map(repr, _SAMPLERS))}")
    return _SAMPLERS[name](diffusion)


class ScheduleSampler(abc.ABC):
    """A distribution over timesteps, and the weights that undo it."""

    @abc.abstractmethod
    def weights(self) -> np.ndarray:
        """What the probabilities of t = 0, …, T−1 are proportional to: (T,), positive."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(t, weights) on `device`: int64 (batch_size,), 0-based, and float32 1/(T·p_t).

        t is drawn by NumPy's global generator (`np.random.seed`), in one `np.random.choice`.
        """
        weights = self.weights()
        probabilities = weights / np.sum(weights)
        t = np.random.choice(len(probabilities), size=(batch_size,), p=probabilities)  # noqa: NPY002
        undo = 1 / (len(probabilities) * probabilities[t])
        return (
            torch.from_numpy(t).to(device, torch.int64),
            torch.from_numpy(undo).float().to(device),
        )


class UniformSampler(ScheduleSampler):
    """Every timestep of `diffusion` alike, with weights 1."""

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses, the same way in every process of a `torch.distributed` group."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Tells every process what this one's batch gave: int64 t (N,) and their unweighted losses (N,).

        Every process must call it; N may differ. Then `update_with_all_losses` is called with the batches of all, in
        the order of the ranks. Without an initialised process group that is this one's alone.
        """
        if len(local_ts) != len(local_losses):
            raise ValueError(f"local_losses has {len(local_losses)} entries; it must have local_ts's {len(local_ts)}")
        local = local_ts.tolist(), local_losses.detach().tolist()
        batches = [local]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            batches *= torch.distributed.get_world_size()
            # As objects: their lengths differ, and the backend's own device carries them.
            torch.distributed.all_gather_object(batches, local)
        self.update_with_all_losses(
            [t for ts, _ in batches for t in ts], [loss for _, losses in batches for loss in losses]
        )

    @abc.abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Takes note of the loss at each t: equal lists in every process, after which their weights must be equal."""


class LossSecondMomentResampler(LossAwareSampler):
    """p_t ∝ √E[L_t²] over the last `history_per_term` losses at t, mixed with `uniform_prob` of the uniform one.

    Uniform until every timestep has been seen that often. arXiv 2102.09672, eq. 18.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros((diffusion.num_timesteps, history_per_term))  # the oldest first
        self._loss_counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        if not (self._loss_counts == self.history_per_term).all():
            return np.ones(len(self._loss_counts))
        moments = np.sqrt(np.mean(self._loss_history**2, axis=1))
        return (1 - self.uniform_prob) * moments / moments.sum() + self.uniform_prob / len(moments)

    def update_with_all_losses(self, ts: Iterable[int], losses: Iterable[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            count = self._loss_counts[t]
            if count == self.history_per_term:
                self._loss_history[t] = [*self._loss_history[t, 1:], loss]
            else:
                self._loss_history[t, count] = loss
                self._loss_counts[t] += 1


_SAMPLERS: dict[str, Any] = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
