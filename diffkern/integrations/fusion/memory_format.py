"""The option channels_last: weights that make a network's activations channels last, and the way back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from diffkern.integrations.fusion.report import Replaced

_CHANGED = "_diffkern_channels_last"  # on a module whose weight was contiguous


def to_channels_last(model: nn.Module) -> Iterator[Replaced]:
    """Store the 4-D weights of convolutions channels last: PyTorch's convolution then gives channels-last outputs.

    A parameter stays the same object. Its gradient, if it has one, follows.
    """
    changed = 0
    for module, weight in _weights(model):
        if weight.dim() == 4 and weight.is_contiguous():
            _store(weight, torch.channels_last)
            module.__dict__[_CHANGED] = True
            changed += 1
    if changed:
        effect = f"channels_last: the weights of {changed} convolutions, and the activations between them"
        yield Replaced("", type(model).__name__, effect)


def restore_formats(model: nn.Module) -> None:
    """Store contiguously again what `to_channels_last` changed, in ``model`` and in whatever it contains."""
    for module, weight in _weights(model):
        if module.__dict__.pop(_CHANGED, False):
            _store(weight, torch.contiguous_format)


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Modules with a parameter `weight` that has a shape; scripted ones keep theirs out of Python's reach."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            weight = module._parameters.get("weight")
            if weight is not None and not is_lazy(weight):
                yield module, weight


@torch.inference_mode(False)  # a parameter made of what inference mode allocates could not be trained
def _store(parameter: nn.Parameter, memory_format: torch.memory_format) -> None:
    parameter.data = parameter.data.contiguous(memory_format=memory_format)
    if parameter.grad is not None:
        parameter.grad = parameter.grad.contiguous(memory_format=memory_format)
