"""Closed-form models for sampler tests: elementwise, so that every image is independent of its batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 4


class Unconditional(nn.Module):
    """0.8·tanh(x) + 0.2·sin(x + t/100), with a variance 0.5·cos(x) behind it if `learned`; float64 inside.

    Float64 inside so that tests see the sampler's rounding and not this one's. It remembers how it was called.
    """

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        self.gain = nn.Parameter(torch.ones(()))
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x, t))
        self.modes.append(self.training)
        assert not torch.is_grad_enabled()
        return self.evaluate(x, t).to(x.dtype)

    def evaluate(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.double() * self.gain
        mean = 0.8 * torch.tanh(x) + 0.2 * torch.sin(x + t.double().reshape(-1, 1, 1, 1) / 100)
        return torch.cat([mean, 0.5 * torch.cos(x)], dim=1) if self.learned else mean


class Conditional(Unconditional):
    """The same, plus 0.1·(y + 1); y = CLASSES, the null label, adds nothing."""

    num_classes = CLASSES

    def __init__(self, learned: bool = False) -> None:
        super().__init__(learned)
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.labels.append(y)
        self.calls.append((x, t))
        return self.evaluate_label(x, t, y).to(x.dtype)

    def evaluate_label(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.evaluate(x, t) + label_shift(y)


class SelfConditioning(Unconditional):
    """The first one, plus 0.3·cos(2·x0) of the x0 that it is given; it remembers copies of those."""

    self_condition = True

    def __init__(self, learned: bool = False) -> None:
        super().__init__(learned)
        self.known: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, *, x_self_cond: Tensor) -> Tensor:
        assert x_self_cond.dtype == x.dtype
        self.known.append(x_self_cond.clone())
        self.calls.append((x, t))
        return self.evaluate_known(x, t, x_self_cond).to(x.dtype)

    def evaluate_known(self, x: Tensor, t: Tensor, x_self_cond: Tensor) -> Tensor:
        output = self.evaluate(x, t)
        mean = output[:, : x.shape[1]] + 0.3 * torch.cos(2 * x_self_cond.double())
        return torch.cat([mean, output[:, x.shape[1] :]], dim=1)


class ConditionalSelfConditioning(SelfConditioning):
    """The same with labels, which shift it by 0.1·(y + 1); the null label by nothing."""

    num_classes = CLASSES

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, x_self_cond: Tensor) -> Tensor:
        return super().forward(x, t, x_self_cond=x_self_cond) + label_shift(y).to(x.dtype)


def label_shift(y: Tensor) -> Tensor:
    return torch.where(y == CLASSES, 0.0, 0.1 * (y + 1)).double().reshape(-1, 1, 1, 1)
