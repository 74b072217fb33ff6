"""What any model may contain: a norm, and a norm with a SiLU after it in a Sequential."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffkern.integrations.fusion.method import Draw, FusedBlock, of_any_size
from diffkern.integrations.fusion.submodules import (
    computes_silu,
    has_kernel,
    is_plain_norm,
    is_plain_silu,
    norm_kind,
    normalised,
    rms_normalised,
)
from diffkern.ops import group_norm


class NormMethod(FusedBlock):
    """A norm by itself: where a block is not known, or has no activation after it, as before attention."""

    does = "norm alone"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return norm_kind(module) is not None

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        channels: Any = _channels(module)
        if norm_kind(module) == "group_norm":
            return (of_any_size(draw, channels, 3, 5),)
        side = 3 if channels != 3 else 4  # one that multiplies by the width instead of the channels is to differ
        return (of_any_size(draw, channels, *[side] * (_rank(module.g) - 2)),)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not has_kernel(args[0]):
            return super().forward(*args, **kwargs)
        (x,) = args
        if norm_kind(self) == "channel_rms_norm":
            return rms_normalised(self, x) if x.dim() == _rank(self.g) else super().forward(x)
        if self.weight is not None and self.weight.dtype != x.dtype and x.dtype.itemsize != 2:
            return super().forward(x)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _rank(g: Tensor) -> int:
    """Of the images that a channel RMSNorm of weight g is for: (1, C, 1, …) tells it, (C,) is for two-dimensional."""
    return 4 if g.dim() == 1 else g.dim()


class SequentialMethod(FusedBlock):
    """A Sequential in which a norm is followed by a SiLU: the two in one op."""

    does = "norm and SiLU in one op"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return type(module) is nn.Sequential and any(True for _ in _pairs(module))

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        channels = next(c for inner in module.modules() if (c := _channels(inner)) is not None)
        rank = max((p.dim() for p in module.parameters()), default=1)  # of a convolution's weight, or a linear map's
        return (draw(2, channels, *[6] * (2 if rank == 1 else rank - 2)),)

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        for index in _pairs(module):
            yield str(index), module[index]
            yield str(index + 1), module[index + 1]

    def forward(self, input: Any) -> Any:
        modules: list[Any] = list(self._modules.values())
        i = 0
        while i < len(modules):
            if i + 1 < len(modules) and _is_plain_pair(modules[i], modules[i + 1]) and has_kernel(input):
                input = normalised(modules[i], modules[i + 1], input)
                i += 2
            else:
                input = modules[i](input)
                i += 1
        return input


def _channels(module: Any) -> int | None:
    """How many channels `module` takes, where that can be read from it."""
    if norm_kind(module) == "channel_rms_norm":
        return int(module.g.numel())
    if norm_kind(module) == "group_norm" and module.weight is not None:
        return int(module.weight.shape[0])
    for name in ("in_channels", "in_features", "num_channels"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return None


def _is_plain_pair(norm: Any, act: Any) -> bool:
    return is_plain_norm(norm) and is_plain_silu(act)


def _pairs(sequential: nn.Sequential) -> Iterator[int]:
    """Indices of norms before a SiLU."""
    for index, (first, second) in enumerate(itertools.pairwise(sequential)):
        if norm_kind(first) is not None and computes_silu(second):
            yield index


class GroupNorm(NormMethod, nn.GroupNorm):
    origin = nn.GroupNorm


class Sequential(SequentialMethod, nn.Sequential):
    origin = nn.Sequential


METHODS = (SequentialMethod, NormMethod)
