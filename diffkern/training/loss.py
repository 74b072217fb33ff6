"""The simple loss of one micro-batch, with every random number taken from a counter."""

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.ops import diffusion_loss_and_grad, philox_uint32, q_sample
from diffkern.process import GaussianProcess
from diffkern.process.gaussian import ProcessTables
from diffkern.sampling.network import network_times

# Streams of the noise layout: what is drawn in one never overlaps what is drawn in another.
_EPS_STREAM, _TIMESTEP_STREAM = 3, 4


class SimpleLoss:
    """Mean squared error against ε, x0 or v at a random timestep (Ho et al. 2020, arXiv 2006.11239, eq. 14).

    Timesteps, noise and label dropout depend on the seed, the optimiser step and an image's position
    in the global batch alone: not on how the batch is split over micro-batches or processes.

    Args:
        process: its ``prediction`` is the target.
        seed: in [0, 2^64).
        null_label: what a dropped label becomes; None if the network takes no labels.
        label_dropout: probability of dropping a label.
        device: of the tables; that of the images.
    """

    def __init__(
        self,
        process: GaussianProcess,
        *,
        seed: int,
        null_label: int | None,
        label_dropout: float,
        device: torch.device,
    ) -> None:
        self.target, self.num_timesteps = process.prediction, process.num_timesteps
        self.tables = process.tables(device)
        self.times = network_times(process.timestep_map, device)
        self.seed, self.null_label = seed, null_label
        self.dropped_below = round(label_dropout * 2**32)

    def __call__(self, model: nn.Module, x0: Tensor, labels: Tensor, draw: Tensor, samples: Tensor) -> Tensor:
        """The mean over the micro-batch, float32 ().

        x0: float32 (N, C, H, W) in [−1, 1]. labels: int64 (N,), read only if the network takes labels.
        draw: int64 (), the optimiser step. samples: int64 (N,), the positions in the global batch.
        Raises ValueError if the output's shape is not the images', as with a learned variance.
        """
        counter: dict[str, Any] = {"draw": draw, "samples": samples}
        words = philox_uint32((len(x0), 2), self.seed, **counter, stream=_TIMESTEP_STREAM, device=x0.device)
        t = (words[:, 0] * self.num_timesteps) >> 32
        eps: dict[str, Any] = {"seed": self.seed, **counter, "stream": _EPS_STREAM}
        x_t = q_sample(x0, t, self.tables.sqrt_alphas_cumprod, self.tables.sqrt_one_minus_alphas_cumprod, **eps)
        if self.null_label is None:
            output = model(x_t, self.times[t])
        else:
            output = model(x_t, self.times[t], labels.masked_fill(words[:, 1] < self.dropped_below, self.null_label))
        if output.shape != x0.shape:
            raise ValueError(f"the model's output is {tuple(output.shape)}, the images are {tuple(x0.shape)}")
        # In float32: a loss scaler's factor must reach the gradient before that is rounded to a 16-bit output's type.
        return _MeanLoss.apply(output.float(), x0, t, self.tables, {"target": self.target, **eps})


class _MeanLoss(torch.autograd.Function):
    """The mean of diffusion_loss over the batch, its gradient made in the same pass: ε is made again, not kept."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x0: Tensor, t: Tensor, tables: ProcessTables, keywords: dict[str, Any]
    ) -> Tensor:
        loss, gradient = diffusion_loss_and_grad(output, x0, t, tables, scale=1 / len(output), **keywords)
        ctx.save_for_backward(gradient)
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("SimpleLoss has no second derivative: its gradient cannot be taken with create_graph")
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None
