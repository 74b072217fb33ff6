"""The loss of one micro-batch, with every random number taken from a counter."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkern.ops import diffusion_loss_and_grad, philox_normal, philox_uint32, q_sample, solver_step
from diffkern.process import GaussianProcess
from diffkern.process.gaussian import ProcessTables
from diffkern.sampling.network import network_times
from diffkern.solvers import StepProgram, step_program
from diffkern.training.objective import Objective

# Streams of the noise layout: what is drawn in one never overlaps what is drawn in another.
_EPS_STREAM, _TIMESTEP_STREAM, _OFFSET_STREAM = 3, 4, 7
# Words of the timesteps' stream: two of every sample, the third of the whole batch's first.
_TIMESTEP, _LABEL_DROPOUT, _SELF_CONDITIONING = 0, 1, 2


class TrainingLoss:
    """The loss of ``objective`` at a random timestep, as ``diffusion_loss`` has it, times the timestep's weight.

    Timesteps, noise and label dropout depend on the seed, the optimiser step and an image's position
    in the global batch alone: not on how the batch is split over micro-batches or processes.

    Offset noise of strength s adds s·o to ε, o ~ N(0, 1) being one number for each image and channel: what is to be
    predicted has it as well.

    Self-conditioning (Chen et al. 2022, arXiv 2208.04202, algorithm 1): in a share of the optimiser steps the network
    first predicts x0 from x_t alone, without gradients, and is then given that, held in [−1, 1], as ``x_self_cond``.
    As in the paper all images of a step share the choice, which here is a number of the step's own counter: so it is
    the same on every process and in every micro-batch, all of them have the same work, the host knows it without
    waiting for the device, and the steps without it cost one evaluation.

    Args:
        process: its ``prediction`` is the target.
        objective: of that process.
        seed: in [0, 2^64).
        null_label: what a dropped label becomes; None if the network takes no labels.
        label_dropout: probability of dropping a label.
        device: of the tables; that of the images.
    """

    def __init__(
        self,
        process: GaussianProcess,
        objective: Objective,
        *,
        seed: int,
        null_label: int | None,
        label_dropout: float,
        device: torch.device,
    ) -> None:
        self.num_timesteps, self.channels = process.num_timesteps, 1 if process.channel_variance == "fixed" else 2
        self.loss = {"target": process.prediction, "loss": objective.loss, "levels": objective.levels}
        self.tables = process.tables(device)
        self.times = network_times(process.timestep_map, device)
        weights = objective.weights(process)
        self.weights = None if weights is None else torch.tensor(weights, device=device)
        self.seed, self.null_label, self.offset_noise = seed, null_label, objective.offset_noise
        self.dropped_below = round(label_dropout * 2**32)
        self.conditioned_below = round(objective.self_conditioning * 2**32)
        self.x0_program = _x0_program(process) if self.conditioned_below else None

    def __call__(self, model: nn.Module, x0: Tensor, labels: Tensor, step: int, samples: Tensor) -> Tensor:
        """The mean over the micro-batch, float32 ().

        x0: float32 (N, C, H, W) in [−1, 1]. labels: int64 (N,), read only if the network takes labels.
        step: the optimiser step. samples: int64 (N,), the positions in the global batch.
        Raises ValueError if the output's shape is not the images', with twice the channels for a learned variance.
        """
        counter: dict[str, Any] = {"draw": torch.tensor(step, device=x0.device), "samples": samples}
        words = philox_uint32((len(x0), 2), self.seed, **counter, stream=_TIMESTEP_STREAM, device=x0.device)
        t = (words[:, _TIMESTEP] * self.num_timesteps) >> 32
        eps = self._eps(x0, counter)
        x_t = q_sample(x0, t, self.tables.sqrt_alphas_cumprod, self.tables.sqrt_one_minus_alphas_cumprod, **eps)
        assert isinstance(x_t, Tensor)  # a pair only if the noise is asked for
        given = [x_t, self.times[t]]
        if self.null_label is not None:
            dropped = words[:, _LABEL_DROPOUT] < self.dropped_below
            given.append(labels.masked_fill(dropped, self.null_label))
        output = model(*given, **self._self_cond(model, given, t, step))
        shape = (len(x0), self.channels * x0.shape[1], *x0.shape[2:])
        if output.shape != shape:
            what = " with a variance" if self.channels == 2 else ""
            raise ValueError(f"the model's output is {tuple(output.shape)}, the images{what} are {shape}")
        weight = None if self.weights is None else self.weights[t]
        # In float32: a loss scaler's factor must reach the gradient before that is rounded to a 16-bit output's type.
        return _MeanLoss.apply(output.float(), x0, t, self.tables, {**self.loss, "weight": weight, **eps})

    def _eps(self, x0: Tensor, counter: dict[str, Any]) -> dict[str, Any]:
        """The source of ε, for the ops: a counter, or with offset noise the tensor."""
        if not self.offset_noise:
            return {"seed": self.seed, **counter, "stream": _EPS_STREAM}
        where: dict[str, Any] = {**counter, "device": x0.device}
        offset = philox_normal(x0.shape[:2], self.seed, **where, stream=_OFFSET_STREAM)
        noise = philox_normal(x0.shape, self.seed, **where, stream=_EPS_STREAM)
        return {"noise": noise.add_(offset[:, :, None, None], alpha=self.offset_noise)}

    def _self_cond(self, model: nn.Module, given: list[Tensor], t: Tensor, step: int) -> dict[str, Tensor]:
        """What the network is given beside x_t, its time and its label: nothing, or its own x0."""
        if self.x0_program is None:
            return {}
        word = philox_uint32((1, 3), self.seed, draw=step, stream=_TIMESTEP_STREAM)[0, _SELF_CONDITIONING]
        if word >= self.conditioned_below:
            return {}
        with torch.no_grad():
            x0 = solver_step(given[0], model(*given).float(), self.x0_program, t)
        assert isinstance(x0, Tensor)  # a pair only of a program that scales the network's input
        return {"x_self_cond": x0}


def _x0_program(process: GaussianProcess) -> StepProgram:
    """Row t makes of x_t and the network's output the x0 that it predicts, in [−1, 1]."""
    a_x, a_m = process.conversion(process.prediction, "x0")
    columns = {"a_x": a_x, "a_m": a_m, "c_0": np.ones(process.num_timesteps)}
    return step_program(columns, process.timestep_map, variance=process.channel_variance, clip=(-1.0, 1.0))


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
            raise RuntimeError("TrainingLoss has no second derivative: its gradient cannot be taken with create_graph")
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None
