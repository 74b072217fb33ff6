"""The model as a sampler sees it: where it lives, how it is put into eval mode, what it is called with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffkern.sampling.arguments import check_tensor

Model = Callable[..., Tensor]


class Placement(NamedTuple):
    """How the state x is to be laid out so that the model takes it as it is."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format


def placement(model: Model) -> Placement:
    """Device and floating dtype of the model's first weight, channels_last if its convolutions' weights are.

    A function without weights gets float32 on the CPU.
    """
    weights: list[Tensor] = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    floating = [weight for weight in weights if weight.is_floating_point()]
    channels_last = any(
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in floating
    )
    return Placement(
        weights[0].device if weights else torch.device("cpu"),
        floating[0].dtype if floating else torch.float32,
        torch.channels_last if channels_last else torch.contiguous_format,
    )


def network_times(times: np.ndarray, device: torch.device | str | None) -> Tensor:
    """What the network is given in place of t (R,): int64 on `device` if all are whole numbers, else float32."""
    whole = (times == np.round(times)).all()
    return torch.tensor(times.astype(np.int64 if whole else np.float32), device=device)


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Put the model into eval mode, and afterwards each of its modules back into the mode that it was in."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Network:
    """One batch's model calls: `network(x, row)`, or `network(x, row, x_self_cond)`, is the model's output at a row.

    `times` is int64 or float32 (R,) on x's device, `labels` int64 (N,) or None. With `null_label` the model is called
    once on the doubled batch [uncond; cond] and returns 2N outputs. Nothing here waits for the device.
    """

    def __init__(
        self, model: Model, times: Tensor, n: int, dtype: torch.dtype, labels: Tensor | None, null_label: int | None
    ) -> None:
        if labels is not None and null_label is not None:
            labels = torch.cat([torch.full_like(labels, null_label), labels])
        self.model = model
        self.dtype = dtype
        self.doubled = null_label is not None
        self.times = times[:, None].repeat(1, 2 * n if self.doubled else n)
        self.labels = () if labels is None else (labels,)

    def __call__(self, x: Tensor, row: int, x_self_cond: Tensor | None = None) -> Tensor:
        known = {} if x_self_cond is None else {"x_self_cond": self._input(x_self_cond)}
        output = self.model(self._input(x), self.times[row], *self.labels, **known)
        # None would be taken for a row that calls no network.
        check_tensor("model", output)
        return output

    def _input(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return torch.cat([x, x]) if self.doubled else x
