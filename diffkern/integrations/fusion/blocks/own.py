"""diffkern's own U-Net, whose norms are ops already: residuals in place, and the options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import models, nn
from diffkern.integrations.fusion.blocks.upsample import EFFECT as FOLDED
from diffkern.integrations.fusion.blocks.upsample import folds
from diffkern.integrations.fusion.method import Draw, FusedBlock
from diffkern.integrations.fusion.submodules import (
    can_split,
    formatted_for,
    has_kernel,
    has_no_hooks,
    residual,
    split_conv,
)
from diffkern.models.unet import Stage
from diffkern.nn.resample import upsample_conv, upsample_nearest


class ResBlockMethod(FusedBlock):
    """`diffkern.nn.ResBlock`."""

    does = "residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return isinstance(module, nn.ResBlock) and type(module).forward is nn.ResBlock.forward

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return draw(2, module.norm1.num_channels, 6, 4), draw(2, module.emb_proj.in_features)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x, h = self.first_half(x)
        h = self.second_half(h, emb)
        return residual(self.skip(x), h, self.conv2)

    def first_half(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for the skip, and the first convolution's output: both in the resolution of the result."""
        h = self.conv1(self._resampled(self.norm1(x)))
        return self._resampled(x), h


class FoldedResBlockMethod(ResBlockMethod):
    """A `diffkern.nn.ResBlock` that doubles the resolution before its first convolution."""

    does = f"{ResBlockMethod.does}; {FOLDED}"
    option = "fold_upsample"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return super().recognises(module) and module.resample == "up" and folds(module.conv1)

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return draw(2, module.norm1.num_channels, 12, 11), draw(2, module.emb_proj.in_features)

    def first_half(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not folds(self.conv1):
            return super().first_half(x)
        h = upsample_conv(self.norm1(x), self.conv1.weight, self.conv1.bias)
        return upsample_nearest(x), h


class AttentionMethod(FusedBlock):
    """`diffkern.nn.Attention`."""

    does = "residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return isinstance(module, nn.Attention) and type(module).forward is nn.Attention.forward

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return (draw(2, module.norm.num_channels, 3, 4),)

    def forward(self, x: Tensor) -> Tensor:
        return residual(x, self.proj(self.attend(x)), self.proj)


class UNetMethod(FusedBlock):
    """`diffkern.models.UNet`, which concatenates in its decoder."""

    does = "virtual_concat: the decoder's first norms and skips read the skip connections where they lie"
    option = "virtual_concat"
    around_fused = True

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return isinstance(module, models.UNet) and type(module).forward is models.UNet.forward

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        size = module.config.size_multiple
        labels = None if module.num_classes is None else torch.tensor([0, module.num_classes - 1])
        return draw(2, module.config.in_channels, size, 2 * size), torch.tensor([1, 500]), labels

    def _run_with_skip(self, stage: Any, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        block = getattr(stage, "block", None)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        if checkpointing or not (
            type(stage) is Stage
            and has_no_hooks(stage)
            and isinstance(block, ResBlockMethod)
            and has_no_hooks(block)
            and block.resample is None
            and can_split(block.skip)
            and h.dtype == skip.dtype == block.skip.weight.dtype
            and has_kernel(h)
        ):
            return super()._run_with_skip(stage, h, skip, emb)  # type: ignore[misc]
        h = formatted_for(skip, h)
        y = block.second_half(block.conv1(block.norm1(h, skip=skip)), emb)
        h = residual(split_conv(block.skip, h, skip), y, block.conv2)
        for name, module in stage.named_children():
            if name != "block":
                h = module(h)
        return h


class ResBlock(ResBlockMethod, nn.ResBlock):
    origin = nn.ResBlock


class FoldedResBlock(FoldedResBlockMethod, nn.ResBlock):
    origin = nn.ResBlock


class Attention(AttentionMethod, nn.Attention):
    origin = nn.Attention


class UNet(UNetMethod, models.UNet):
    origin = models.UNet


METHODS = (UNetMethod, FoldedResBlockMethod, ResBlockMethod, AttentionMethod)
