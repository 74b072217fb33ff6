"""The learned schedule's part of a training run: its weights, their average, and what a checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffkern.models.checkpoints import load_state
from diffkern.process import GaussianProcess
from diffkern.training import checkpoint as files
from diffkern.training.learned_schedule import LearnedSchedule
from diffkern.training.log_snr import LearnedLogSNR

SCHEDULE, SCHEDULE_EMA = "schedule.safetensors", "schedule_ema.safetensors"


class ScheduleState:
    """A ``LearnedSchedule`` in training, for data of ``levels`` grey levels.

    Attributes:
        schedule: the module whose weights the optimiser changes.
        ema: its running average, from which the tables are made.

    Raises ValueError for a first schedule of which no tables can be made, as its first beta is lost in float64.
    """

    def __init__(self, description: LearnedSchedule, levels: int, device: torch.device) -> None:
        self.description = description
        self.schedule = description.build(levels).to(device)
        self.ema = AveragedModel(self.schedule).requires_grad_(False)
        self.process()  # a schedule that makes no tables is an error now, not at the first checkpoint

    def parameters(self) -> list[nn.Parameter]:
        return list(self.schedule.parameters())

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by the names of the files."""
        return {SCHEDULE: self.schedule, SCHEDULE_EMA: self.ema.module}

    def files(self) -> dict[str, Callable[[Path], object]]:
        """What writes them, by the same names."""
        return {name: partial(_write, module) for name, module in self.modules().items()}

    def restore(self, checkpoint: Path, steps: int) -> None:
        """Take the weights of ``checkpoint``, written after ``steps`` steps; CheckpointError unless they fit."""
        for name, network in self.modules().items():
            load_state(network, files.read_weights(checkpoint / name), str(checkpoint / name))
        self.ema.n_averaged.fill_(steps)

    def reduce_gradients(self, accelerator: Any) -> None:
        """The mean over the processes: the network's wrapper sees to the network's gradients alone."""
        if accelerator.num_processes > 1:
            for parameter in self.parameters():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")

    def average(self, decay: float) -> None:
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.ema.update_parameters(self.schedule)

    def process(self) -> GaussianProcess:
        """The averaged schedule as tables."""
        described = self.description
        averaged = self.ema.module
        assert isinstance(averaged, LearnedLogSNR)
        return averaged.process(described.num_timesteps, described.prediction, described.variance)


def _write(module: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}, path)
