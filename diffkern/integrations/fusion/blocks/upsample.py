"""The option fold_upsample: nearest-neighbour ×2 and the 3×3 convolution after it, as one on the small image.

The convolution is bypassed, so it must be plain; one with an adapter is called on the upsampled image as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffkern.integrations.fusion.method import Draw, FusedBlock
from diffkern.integrations.fusion.submodules import is_plain
from diffkern.nn import Upsample as OwnUpsample
from diffkern.nn.resample import can_fold, upsample_conv

EFFECT = "fold_upsample: nearest ×2 and 3×3 convolution as one transposed convolution, 4 of 9 multiplications"


def folds(conv: Any) -> bool:
    """Whether `conv` may be bypassed, and computed together with the upsampling before it."""
    return is_plain(conv, nn.Conv2d) and can_fold(conv)


class UpsampleMethod(FusedBlock):
    """The modules named ``Upsample`` of guided-diffusion and improved-diffusion, and `diffkern.nn.Upsample`."""

    does = EFFECT
    option = "fold_upsample"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        known = isinstance(module, OwnUpsample) or (
            type(module).__name__ == "Upsample" and getattr(module, "use_conv", False) and hasattr(module, "channels")
        )
        return known and getattr(module, "dims", 2) == 2 and folds(getattr(module, "conv", None))

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return (draw(1, module.conv.in_channels, 15, 18),)  # as many pixels as it takes to be folded

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or x.dim() != 4 or not folds(self.conv):
            return super().forward(x, *args, **kwargs)
        return upsample_conv(x, self.conv.weight, self.conv.bias)


class SequentialUpsampleMethod(FusedBlock):
    """A Sequential of ``nn.Upsample(scale_factor=2)`` and a convolution, as in denoising-diffusion-pytorch."""

    does = EFFECT
    option = "fold_upsample"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return type(module) is nn.Sequential and any(_doubles(a) and folds(b) for a, b in itertools.pairwise(module))

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        first = next(inner for inner in module if isinstance(inner, nn.Conv2d))
        return (draw(1, first.in_channels, 15, 18),)

    def forward(self, input: Any) -> Any:
        modules: Iterator[Any] = iter(self._modules.values())
        waiting = None
        for module in modules:
            if waiting is not None:
                if folds(module) and input.dim() == 4:
                    input, waiting = upsample_conv(input, module.weight, module.bias), None
                    continue
                input, waiting = waiting(input), None
            if _doubles(module):
                waiting = module
            else:
                input = module(input)
        return input if waiting is None else waiting(input)


def _doubles(module: Any) -> bool:
    return is_plain(module, nn.Upsample) and module.mode == "nearest" and module.scale_factor in (2, 2.0, (2.0, 2.0))


METHODS = (UpsampleMethod, SequentialUpsampleMethod)
