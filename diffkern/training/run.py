"""The state of one training run: what a step changes, and what a checkpoint holds."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffkern.models import UNet, load_state, save_model
from diffkern.models.checkpoints import CheckpointError
from diffkern.process import GaussianProcess
from diffkern.training import checkpoint as files
from diffkern.training.config import TrainConfig
from diffkern.training.data.loader import CheckedImages, micro_batches
from diffkern.training.data.order import StreamBatches
from diffkern.training.learned_schedule import ContinuousLoss, LearnedSchedule
from diffkern.training.loss import TrainingLoss
from diffkern.training.objective import Objective, objective_before
from diffkern.training.schedule_state import ScheduleState


class TrainingRun:
    """Network, average, optimiser and counters of a run on accelerate.

    Attributes:
        accelerator: accelerate's, with this run's precision.
        device: where the network now is.
        ema: the running average of the network.
        schedule: the noise schedule in training, None for a process whose tables are given.
        step: optimiser steps done.
        losses: the mean loss of each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        process: GaussianProcess | LearnedSchedule,
        objective: Objective,
        images: CheckedImages,
        config: TrainConfig,
        null: int | None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, is_initialized

        self.config, self.objective, self.images = config, objective, images
        # accelerate keeps the precision of the first run of a Python process, and refuses any other.
        if is_initialized() and AcceleratorState().mixed_precision != config.mixed_precision:
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulation
        )
        if config.mixed_precision == "fp16" and self.accelerator.scaler is None:
            raise ValueError(f"mixed_precision='fp16' needs a GPU, not {self.accelerator.device}: use 'bf16' or 'no'")
        self.device = self.accelerator.device
        self.bare = model.to(self.device)
        self.ema = AveragedModel(self.bare).requires_grad_(False)
        self.ema.eval()
        self.adamw = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._lr_scales = [1.0]
        drawn: dict[str, Any] = {"seed": config.seed, "null_label": null, "label_dropout": config.label_dropout}
        self.schedule: ScheduleState | None = None
        self.loss: TrainingLoss | ContinuousLoss
        if isinstance(process, LearnedSchedule):
            self.schedule = ScheduleState(process, objective.levels, self.device)
            self.adamw.add_param_group({"params": self.schedule.parameters(), "weight_decay": 0.0})
            self._lr_scales.append(process.lr_scale)
            sizes = {"levels": objective.levels, "batch_size": config.batch_size}
            self.loss = ContinuousLoss(self.schedule.schedule, process, **sizes, **drawn)
        else:
            self._process = process
            self.loss = TrainingLoss(process, objective, device=self.device, **drawn)
        self.step, self.losses = 0, list[float]()
        self._generators: list[dict[str, Tensor]] = []

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Network prepared and in training mode, torch's generators set; gives the endless micro-batches.

        Afterwards the network's mode, its forward and the caller's generators are as they were.
        """
        mode = self.bare.training
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                self.model, self.optimizer = self.accelerator.prepare(self.bare, self.adamw)
                self.model.train()
                self.order = StreamBatches(
                    len(self.images),
                    self.config.batch_size,
                    self.config.seed,
                    start_step=self.step,
                    accumulation=self.config.accumulation,
                    rank=self.accelerator.process_index,
                    world_size=self.accelerator.num_processes,
                )
                self._seed_generators()
                yield micro_batches(self.images, self.order, self.config.workers, self.device)
        finally:
            self.accelerator.unwrap_model(self.bare, keep_fp32_wrapper=False).train(mode)
            # accelerate passes by a model that carries this mark, and a second run would be without its precision.
            vars(self.bare).pop("_is_accelerate_prepared", None)

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimiser step; [its mean loss, the gradient's norm before clipping] of this process, on the device."""
        lr = self.config.lr * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        for group, scale in zip(self.adamw.param_groups, self._lr_scales, strict=True):
            group["lr"] = scale * lr
        total = torch.zeros((), device=self.device)
        for micro in range(self.config.accumulation):
            x0, labels = next(batches)
            samples = torch.arange(len(x0), device=self.device) + self.order.offset(micro)
            with self.accelerator.accumulate(self.model):
                loss = self.loss(self.model, x0, labels, self.step, samples)
                self.accelerator.backward(loss)
            total += loss.detach() / self.config.accumulation
        if self.schedule is not None:
            self.schedule.reduce_gradients(self.accelerator)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A long average has no business remembering the first, random weights: its decay grows with the run.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.ema.update_parameters(self.bare)
        if self.schedule is not None:
            self.schedule.average(decay)
        self.step += 1
        return torch.stack([total, norm.to(total.dtype)])

    @property
    def process(self) -> GaussianProcess:
        """What to sample with: the given process, or the learned schedule as it is now."""
        return self._process if self.schedule is None else self.schedule.process()

    def save(self, output: Path) -> Path:
        """Write a checkpoint of the present step, unless it is there already; every process must call this.

        Raises:
            FloatingPointError: a weight is NaN or Inf; nothing is written.
            OSError: the checkpoint could not be written.
        """
        learned = self.schedule.modules().values() if self.schedule is not None else ()
        for network in (self.bare, self.ema.module, *learned):
            for name, tensor in network.state_dict().items():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(f"{name} holds NaN or Inf after step {self.step}: it was not saved")
        newest = files.list_checkpoints(output)[-1:]
        if newest and files.checkpoint_step(newest[0]) == self.step:
            return newest[0]
        state = self._training_state()
        where = output / "checkpoints" / f"step_{self.step:08d}"
        if self.accelerator.is_main_process:
            where = files.save_checkpoint(
                output,
                self.step,
                {
                    files.MODEL: lambda path: _write_weights(path, self.bare),
                    files.EMA: lambda path: _write_weights(path, self.ema.module),
                    files.PROCESS: lambda path: path.write_text(
                        json.dumps(files.describe_process(self.process, self.images.shape))
                    ),
                    files.TRAINING: lambda path: files.write_training_state(path, state),
                }
                | (self.schedule.files() if self.schedule is not None else {}),
                self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()
        return where

    def restore(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``.

        Raises:
            CheckpointError: a file of it cannot be read, or belongs to another network; the run had another seed,
                batch size or number of images, which decide the order of the images, or another process or objective.
        """
        state = files.read_training_state(checkpoint)
        process, _ = files.read_process(checkpoint)
        objective = state.get("objective") or objective_before(process, self.objective.levels).describe()
        described = {**state["order"], **objective, "num_timesteps": process.num_timesteps}
        num_timesteps = self.loss.num_timesteps
        for name, now in {**self._order_key(), **self.objective.describe(), "num_timesteps": num_timesteps}.items():
            was = described.get(name)
            if was != now:
                raise CheckpointError(f"{checkpoint}: its run had {name}={was!r}, this one has {now!r}")
        if self.schedule is None and not _same_tables(process, self._process):
            raise CheckpointError(f"{checkpoint}: its run had another noise schedule than this one")
        for network, name in ((self.bare, files.MODEL), (self.ema.module, files.EMA)):
            load_state(network, files.read_weights(checkpoint / name), str(checkpoint / name))
        if self.schedule is not None:
            self.schedule.restore(checkpoint, state["step"])
        self.adamw.load_state_dict(state["optimizer"])
        # The present configuration counts, as for lr; a schedule's weights, the second group, never decay.
        self.adamw.param_groups[0]["weight_decay"] = self.config.weight_decay
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.losses = state["step"], state["losses"].tolist()
        self.ema.n_averaged.fill_(self.step)
        self._generators = state["generators"]

    def _order_key(self) -> dict[str, int]:
        return {"seed": self.config.seed, "batch_size": self.config.batch_size, "images": len(self.images)}

    def _training_state(self) -> dict[str, Any]:
        from accelerate.utils import gather_object

        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "step": self.step,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "order": self._order_key(),
            "objective": self.objective.describe(),
            "optimizer": self.adamw.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "generators": gather_object([generators]),
        }

    def _seed_generators(self) -> None:
        """Dropout is all that draws from torch's generators: one stream a process."""
        rank = self.accelerator.process_index
        if len(self._generators) == self.accelerator.num_processes:
            torch.set_rng_state(self._generators[rank]["cpu"])
            if self.device.type == "cuda" and "cuda" in self._generators[rank]:
                torch.cuda.set_rng_state(self._generators[rank]["cuda"], self.device)
        else:  # a new run, or one that goes on with another number of processes
            torch.manual_seed((self.config.seed + self.step * self.accelerator.num_processes + rank) % 2**64)


def _same_tables(one: GaussianProcess, other: GaussianProcess) -> bool:
    """Whether two processes of as many timesteps have the same levels of noise, but for rounding, at the same times."""
    return all(
        np.allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=0) for name in ("betas", "timestep_map")
    )


def _write_weights(path: Path, model: nn.Module) -> None:
    if isinstance(model, UNet):
        save_model(path, model)
        return
    from safetensors.torch import save_file

    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}, path)
