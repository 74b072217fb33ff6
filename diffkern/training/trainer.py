"""Training a diffusion model: ``Trainer(model, process, data, TrainConfig()).fit()``."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffkern.process import GaussianProcess
from diffkern.training.checkpoint import list_checkpoints, remove_leftovers, require_fresh
from diffkern.training.config import TrainConfig, TrainResult
from diffkern.training.data.base import DEFAULT_LEVELS
from diffkern.training.data.loader import CheckedImages
from diffkern.training.interrupt import TrainingInterrupted, deferred_interrupt
from diffkern.training.objective import make_objective
from diffkern.training.run import TrainingRun

# Reading a loss makes the host wait for a GPU; on a CPU it costs nothing.
_STEPS_BETWEEN_READS = {"cpu": 1}
_DEFAULT_STEPS_BETWEEN_READS = 10


class Trainer:
    """Trains ``model`` on ``data`` with AdamW and a running average of the weights.

    Args:
        model: called as ``model(x_t, t)`` with x_t float32 (N, C, H, W) and t int64 (N,), or as
            ``model(x_t, t, labels)`` if its attribute ``num_classes`` is a number; ``num_classes`` itself is
            then the null label. If its attribute ``self_condition`` is true, some calls have ``x_self_cond``, like
            x_t, as well. It returns (N, C, H, W), or 2C channels if the variance is learned. It is trained in place.
            Checkpoints of a ``diffkern.models.UNet`` hold its configuration and can be sampled from the command line;
            of any other network, its weights.
        process: gives the tables and, by its ``prediction`` and ``variance``, what the network learns to give.
        data: map-style dataset of float images (C, H, W) in [−1, 1], or of ``(image, label)``. Its attribute
            ``levels``, if it has one, says how many grey levels they have.
        config: see ``TrainConfig``; docs/training.md has the losses and weightings.

    Launching on several processes and mixed precision are accelerate's: ``accelerate launch`` works as usual.

    Raises:
        ValueError: a loss, a weighting, a process and a model that do not go together; labels that data and
            model do not agree about; label dropout for a model without a null label; what reading the first image
            raises.
    """

    def __init__(self, model: nn.Module, process: GaussianProcess, data: Dataset[Any], config: TrainConfig) -> None:
        num_classes = getattr(model, "num_classes", None)
        model_config = getattr(model, "config", None)
        if num_classes is not None and config.label_dropout > 0 and not getattr(model_config, "null_label", True):
            raise ValueError(
                f"label_dropout={config.label_dropout} needs a model with a null label: "
                "build it with null_label=True, or set label_dropout=0"
            )
        if len(data) == 0:  # type: ignore[arg-type]  # Dataset does not declare it; map-style ones have it
            raise ValueError("data: the dataset is empty")
        self.objective = make_objective(
            config,
            process,
            levels=getattr(data, "levels", DEFAULT_LEVELS),
            takes_self_cond=bool(getattr(model, "self_condition", False)),
        )
        self.images = CheckedImages(data, num_classes)
        self.model, self.process, self.config, self.null_label = model, process, config, num_classes

    def fit(self, *, resume: bool = False) -> TrainResult:
        """Train up to ``config.steps`` and save the last step.

        ``resume`` goes on from the newest checkpoint in ``config.output`` (from the beginning if there is none yet).
        In a single process the resumed weights equal those of an uninterrupted run bit for bit.

        Raises:
            FileExistsError: ``config.output`` holds checkpoints and ``resume`` is False.
            CheckpointError: the newest one is truncated, or of another network, order of images or objective.
            FloatingPointError: the loss or the gradient became NaN or Inf; says in which step. The last checkpoint
                stays; the weights in memory may be spoilt.
            OSError: a checkpoint could not be written, as on a full disk; the older ones stay.
            TrainingInterrupted: Ctrl-C; the step in hand was finished and saved. A KeyboardInterrupt.
        """
        output = self.config.output
        if output and not resume:
            require_fresh(output)
        found = list_checkpoints(output) if output else []
        run = TrainingRun(self.model, self.process, self.objective, self.images, self.config, self.null_label)
        if output and run.accelerator.is_main_process:
            remove_leftovers(output)
        if found:
            run.restore(found[-1])
        first, begin = run.step, time.perf_counter()
        checkpoint = found[-1] if found else None
        with run.prepared() as batches:
            checkpoint = _loop(run, batches, checkpoint)
        seconds = time.perf_counter() - begin
        rate = (run.step - first) * self.config.batch_size / seconds
        return TrainResult(run.losses, checkpoint, rate, run.ema.module)


def _loop(run: TrainingRun, batches: Iterator[tuple[Tensor, Tensor]], checkpoint: Path | None) -> Path | None:
    """Steps, with everything around them: bar, checks, checkpoints, Ctrl-C. Returns the last checkpoint."""
    from tqdm import tqdm

    config = run.config
    read_every = _STEPS_BETWEEN_READS.get(run.device.type, _DEFAULT_STEPS_BETWEEN_READS)
    hidden = not (config.progress and run.accelerator.is_main_process)
    unread: list[Tensor] = []
    with deferred_interrupt() as interrupted, tqdm(total=config.steps, initial=run.step, disable=hidden) as bar:
        while run.step < config.steps:
            unread.append(run.train_step(batches))
            due = run.step % config.checkpoint_every == 0 or run.step == config.steps
            if not due and run.step % read_every:
                continue
            stop = _read(run, unread, interrupted(), checkpoint)
            _show(bar, run, len(unread))
            unread.clear()
            if config.output and (due or stop):
                checkpoint = run.save(config.output)
            if stop and run.step < config.steps:
                raise TrainingInterrupted(run.step, checkpoint)
    return checkpoint


def _read(run: TrainingRun, unread: list[Tensor], interrupted: bool, checkpoint: Path | None) -> bool:
    """Append the losses of the steps not yet read; True if Ctrl-C has reached any process.

    All processes read at the same steps, and what they see is averaged, so that all stop at the same one.
    """
    flag = torch.full((1, 2), float(interrupted), device=run.device)
    *rows, flag_row = run.accelerator.reduce(torch.cat([torch.stack(unread), flag]), "mean").tolist()
    for step, (loss, norm) in enumerate(rows, run.step - len(rows) + 1):
        # In fp16 a gradient overflows now and then: the loss scaler sees it, and skips the step.
        value, name = (norm, "gradient") if math.isfinite(loss) and run.accelerator.scaler is None else (loss, "loss")
        if not math.isfinite(value):
            kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
            raise FloatingPointError(f"the {name} is {value} in step {step} of {run.config.steps}; {kept}")
        run.losses.append(loss)
    return flag_row[0] > 0


def _show(bar: Any, run: TrainingRun, steps: int) -> None:
    rate = bar.format_dict["rate"]
    speed = f", {rate * run.config.batch_size:.0f} images/s" if rate else ""
    bar.set_postfix_str(f"loss {run.losses[-1]:.4f}{speed}", refresh=False)
    bar.update(steps)
