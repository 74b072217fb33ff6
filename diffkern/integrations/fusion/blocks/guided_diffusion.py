"""The residual block of guided-diffusion and improved-diffusion, in one, two or three dimensions.

Both are used as copies, seldom as packages: names and attributes tell the block, not modules. What is overridden is
``_forward``, so that ``forward`` goes on deciding about checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffkern.integrations.fusion.blocks.generic import SequentialMethod
from diffkern.integrations.fusion.blocks.upsample import EFFECT as FOLDED
from diffkern.integrations.fusion.blocks.upsample import folds
from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as
from diffkern.integrations.fusion.submodules import (
    computes_silu,
    has_kernel,
    has_no_hooks,
    is_plain,
    norm_kind,
    normalised,
    residual,
)
from diffkern.nn.resample import upsample_conv


class ResBlockMethod(FusedBlock):
    """``ResBlock``: ``in_layers`` and ``out_layers`` are Sequentials of norm, SiLU, dropout and convolution."""

    does = "GroupNorm and SiLU twice, residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        parts = {"in_layers", "emb_layers", "out_layers", "skip_connection"}
        if not (computes_as(module, "ResBlock") and hasattr(module, "_forward") and parts <= set(module._modules)):
            return False
        inner, outer = module.in_layers, module.out_layers
        return _is_norm_silu(inner, 3) and _is_norm_silu(outer, 4) and hasattr(module, "use_scale_shift_norm")

    @classmethod
    def effect(cls, module: Any) -> str:
        return f"{cls.does}, time {'scale and shift' if module.use_scale_shift_norm else 'offset'}"

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        weight = module.in_layers[-1].weight
        x = draw(2, weight.shape[1], *[4] * (weight.dim() - 2))
        return x, draw(2, module.emb_layers[-1].weight.shape[1])

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        for name in ("in_layers", "out_layers"):
            layers = module._modules[name]
            yield name, layers
            yield f"{name}.0", layers[0]
            yield f"{name}.1", layers[1]

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not has_kernel(x):
            return super()._forward(x, emb)  # type: ignore[misc]
        x, h = self.first_half(x)
        h = self.second_half(h, emb)
        return residual(self.skip_connection(x), h, self.last_layer())

    def first_half(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for the shortcut, and the first convolution's output: both in the resolution of the result."""
        layers = self.in_layers
        if not getattr(self, "updown", False):
            if not is_plain(layers, nn.Sequential):
                return x, layers(x)
            return x, layers[2](normalised(layers[0], layers[1], x))
        h = self.h_upd(normalised(layers[0], layers[1], x))  # the original does not call in_layers here either
        return self.x_upd(x), layers[2](h)

    def second_half(self, h: Tensor, emb: Tensor) -> Tensor:
        """From the first convolution's output to the second's, with the time embedding at the norm between them."""
        layers = self.out_layers
        projection = self.emb_layers(emb).type(h.dtype)
        if self.use_scale_shift_norm:
            scale, shift = projection.chunk(2, dim=1)
            h = normalised(layers[0], layers[1], h, scale=scale, shift=shift)
        elif is_plain(layers, nn.Sequential):
            h = normalised(layers[0], layers[1], h, offset=projection)
        else:
            return layers(h + projection[(...,) + (None,) * (h.dim() - 2)])
        return layers[3](layers[2](h))

    def last_layer(self) -> nn.Module:
        """What made the output of `second_half`, as far as nothing but it has seen that."""
        layers: Any = self.out_layers
        return layers[3] if self.use_scale_shift_norm or is_plain(layers, nn.Sequential) else layers


class FoldedResBlockMethod(ResBlockMethod):
    """A ``ResBlock`` that doubles the resolution between its first SiLU and its first convolution."""

    option = "fold_upsample"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not (super().recognises(module) and getattr(module, "updown", False)):
            return False
        return _only_doubles(module.h_upd) and folds(module.in_layers[2])

    @classmethod
    def effect(cls, module: Any) -> str:
        return f"{super().effect(module)}; {FOLDED}"

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        x, emb = super().example(module, draw)
        return draw(2, x.shape[1], 12, 12), emb  # as many pixels as it takes to be folded

    def first_half(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layers = self.in_layers
        if not (_only_doubles(self.h_upd) and folds(layers[2])):
            return super().first_half(x)
        h = normalised(layers[0], layers[1], x)
        return self.x_upd(x), upsample_conv(h, layers[2].weight, layers[2].bias)


class ClassifierHeadMethod(SequentialMethod):
    """The ``out`` of ``EncoderUNetModel`` that pools by attention, which fits images of one size."""

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return super().recognises(module) and any(type(m).__name__ == "AttentionPool2d" for m in module)

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        pool = next(m for m in module if type(m).__name__ == "AttentionPool2d")
        channels, pixels_and_mean = pool.positional_embedding.shape
        side = math.isqrt(pixels_and_mean - 1)
        return (draw(2, channels, side, side),)


def _is_norm_silu(layers: Any, length: int) -> bool:
    """Whether `layers` is a Sequential of so many: a norm, SiLU, …, a convolution."""
    if type(layers) is not nn.Sequential or len(layers) != length:
        return False
    return norm_kind(layers[0]) == "group_norm" and computes_silu(layers[1]) and hasattr(layers[-1], "weight")


def _only_doubles(upsample: Any) -> bool:
    """Whether a block's ``h_upd`` is nearest-neighbour ×2 of images, and nothing else."""
    if type(upsample).__name__ != "Upsample" or not has_no_hooks(upsample):
        return False
    return not upsample.use_conv and upsample.dims == 2


METHODS = (FoldedResBlockMethod, ResBlockMethod, ClassifierHeadMethod)
