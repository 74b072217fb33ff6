"""What a file of `blocks` says of a block: how to know it, how to try it, and its forward over the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffkern.integrations.fusion.swap import Fused

Draw = Callable[..., Tensor]


class FusedBlock(Fused):
    """A way to compute one kind of block.

    A subclass overrides the block's ``forward`` (or what that calls), and says with the class methods below what `fuse`
    needs to know. They are given modules of the origin's class, not yet of this one.
    """

    does: ClassVar[str]
    """What is done in one pass, for the report."""

    option: ClassVar[str | None] = None
    """The option of `fuse` without which the block is left alone."""

    around_fused: ClassVar[bool] = False
    """Whether it calls on fused blocks inside: then it is tried after these are in place."""

    @classmethod
    def recognises(cls, module: Any) -> bool:
        """Whether the class and the attributes of `module` are those of the block."""
        raise NotImplementedError

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        """Arguments for a call of `module`: random tensors, draw(shape), of few pixels."""
        raise NotImplementedError

    @classmethod
    def example_keywords(cls, module: Any) -> dict[str, Any]:
        """Arguments for that call that can be given by name only."""
        return {}

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of what is computed without being called, where it is plain."""
        yield from ()

    @classmethod
    def effect(cls, module: Any) -> str:
        """`does`, or more of it where that depends on the block's settings."""
        return cls.does


def of_any_size(draw: Draw, *shape: int) -> Tensor:
    """draw(3, *shape) of three magnitudes, as an eps shows itself in small values, and where it is added too."""
    return draw(3, *shape) * torch.tensor([1.0, 1e-3, 1e-10]).reshape(3, *[1] * len(shape))


def computes_as(module: nn.Module, name: str) -> bool:
    """Whether the class of `module` is called `name`, or takes the forward from one that is."""
    kinds = [kind for kind in type(module).__mro__ if kind.__name__ == name]
    return any(type(module).forward is kind.forward for kind in kinds)  # type: ignore[attr-defined]
