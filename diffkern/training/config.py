"""What a training run is told, and what it gives back."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from diffkern.process import GaussianProcess

Loss = Literal["mse", "rescaled_mse", "hybrid", "kl", "rescaled_kl"]
Weighting = Literal["min_snr", "soft_min_snr", "p2", "edm", "laplace"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; also the flags of ``diffkern train``.

    Raises:
        ValueError: a field outside its range; names it.
    """

    steps: int = 10_000
    """Optimiser steps in all, those before a resume included."""
    batch_size: int = 64
    """Images per optimiser step, over all processes and all accumulated micro-batches."""
    lr: float = 2e-4
    """Learning rate of AdamW after the warm-up."""
    warmup_steps: int = 500
    """Steps in which the learning rate grows linearly from lr / warmup_steps to lr."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    grad_clip: float = 1.0
    """Largest 2-norm of the whole gradient; a longer one is scaled down to it."""
    ema_decay: float = 0.999
    """Decay of the running average of the weights; in step n it is at most (n + 1) / (n + 10)."""
    label_dropout: float = 0.1
    """Probability of training an image without its label, for classifier-free guidance."""
    loss: Loss | None = None
    """What is minimised: the squared error (mse); the bound in bits/dim (kl), or times the number of timesteps
    (rescaled_kl); or both, the bound training a learned variance alone (hybrid; rescaled_mse: times timesteps / 1000).
    By default mse, and rescaled_mse for a learned variance."""
    levels: int | None = None
    """Grey levels of the data, for the bound; by default what the data say, or 256."""
    weighting: Weighting | None = None
    """How much each level of noise counts; by default all the same."""
    weighting_gamma: float | None = None
    """The option gamma of min_snr (5 by default), soft_min_snr (4) and p2 (1)."""
    weighting_k: float | None = None
    """The option k of p2 (1 by default)."""
    weighting_sigma_data: float | None = None
    """The option sigma_data of edm (0.5 by default)."""
    weighting_loc: float | None = None
    """The option loc of laplace, the log SNR that counts most (0 by default)."""
    weighting_scale: float | None = None
    """The option scale of laplace, its width in log SNR (0.5 by default)."""
    offset_noise: float = 0.0
    """Strength of a noise that each channel of an image has in common, added to the noise; 0.1 is usual."""
    self_conditioning: float = 0.0
    """Share of the steps in which the network is given its own prediction of the image; 0.5 is usual."""
    accumulation: int = 1
    """Micro-batches whose gradients are summed for one optimiser step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast dtype of the network; weights and optimiser stay float32."""
    seed: int = 0
    """Of data order, noise, timesteps, label dropout and dropout; 0 to 2^64 - 1."""
    output: Path | None = None
    """Folder of the run; checkpoints go to its subfolder "checkpoints". None: nothing is saved."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one more is written at the end."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""
    workers: int = 0
    """Processes that load images; 0 loads them in the training process."""
    progress: bool = True
    """Show a bar with loss and images per second."""

    def __post_init__(self) -> None:
        for name, kinds in (("loss", Loss), ("weighting", Weighting)):
            names = get_args(kinds)
            known = getattr(self, name) is None or getattr(self, name) in names
            _require(known, self, name, f"{', '.join(map(repr, names))} or None")
        _require(self.levels is None or self.levels >= 2, self, "levels", "2 or more, or None")
        _require(0 <= self.offset_noise < math.inf, self, "offset_noise", "0 or more, and finite")
        _require(0 <= self.self_conditioning <= 1, self, "self_conditioning", "in [0, 1]")
        for option in self.weighting_options:
            _require(self.weighting is not None, self, f"weighting_{option}", "None without a weighting")
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, self, name, "1 or more")
        for name in ("warmup_steps", "workers", "weight_decay"):
            _require(getattr(self, name) >= 0, self, name, "0 or more")
        for name in ("lr", "grad_clip"):
            _require(getattr(self, name) > 0, self, name, "more than 0")
        for name in ("ema_decay", "label_dropout"):
            _require(0 <= getattr(self, name) < 1, self, name, "in [0, 1)")
        _require(self.mixed_precision in ("no", "bf16", "fp16"), self, "mixed_precision", "'no', 'bf16' or 'fp16'")
        _require(0 <= self.seed < 2**64, self, "seed", "in [0, 2^64)")

    @property
    def weighting_options(self) -> dict[str, float]:
        """Those that are given, as ``process.loss_weights`` takes them."""
        names = ("gamma", "k", "sigma_data", "loc", "scale")
        values = {name: getattr(self, f"weighting_{name}") for name in names}
        return {name: value for name, value in values.items() if value is not None}


def _require(holds: bool, config: TrainConfig, name: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r}: it must be {allowed}")


@dataclass(frozen=True)
class TrainResult:
    """What ``Trainer.fit`` returns.

    Attributes:
        losses: mean loss of every step since step 0, those before a resume included.
        checkpoint: folder of the last checkpoint, or None without an output folder.
        images_per_second: over the steps of this call, saving included.
        ema: the averaged network, in evaluation mode, on the training device: the one to sample from.
        process: the process to sample it with: the given one, or that of the learned schedule.
    """

    losses: list[float]
    checkpoint: Path | None
    images_per_second: float
    ema: nn.Module
    process: GaussianProcess
