"""The residual block of diffusers and its upsampling.

Nothing here imports diffusers; the classes that are swapped in stand in `diffusers_classes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.integrations.fusion.blocks.upsample import EFFECT as FOLDED
from diffkern.integrations.fusion.blocks.upsample import folds
from diffkern.integrations.fusion.method import Draw, FusedBlock
from diffkern.integrations.fusion.submodules import has_kernel, has_no_hooks, normalised, residual
from diffkern.nn.resample import upsample_conv, upsample_nearest


class ResnetMethod(FusedBlock):
    """``ResnetBlock2D``: of UNet2DModel, UNet2DConditionModel, ControlNetModel, AutoencoderKL and others."""

    does = "GroupNorm and SiLU twice, residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_diffusers(module, "ResnetBlock2D") and hasattr(module, "time_embedding_norm")

    @classmethod
    def effect(cls, module: Any) -> str:
        if module.time_emb_proj is None:
            return cls.does
        return f"{cls.does}, time {'scale and shift' if module.time_embedding_norm == 'scale_shift' else 'offset'}"

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        temb = None if module.time_emb_proj is None else draw(2, module.time_emb_proj.in_features)
        return draw(2, module.norm1.num_channels, 4, 4), temb

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        yield "norm1", module.norm1
        yield "norm2", module.norm2
        yield "nonlinearity", module.nonlinearity

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        raw_temb = (temb is None) != (self.time_emb_proj is None)  # of which only diffusers knows what it means
        if args or kwargs or raw_temb or not has_kernel(input_tensor):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = self.first_half(input_tensor)
        h = self.second_half(h, temb)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return residual(x, h, self.conv2, self.output_scale_factor)

    def first_half(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for the shortcut, and the first convolution's output: both in the resolution of the result."""
        h = normalised(self.norm1, self.nonlinearity, x)
        for resample in (self.upsample, self.downsample):
            if resample is None:
                continue
            if resample is self.upsample and h.shape[0] >= 64:  # as diffusers: channels-last upsampling fails for many
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        return x, self.conv1(h)

    def second_half(self, h: Tensor, temb: Any) -> Tensor:
        """From the first convolution's output to the second's, with the time embedding at the norm between them."""
        if temb is None:
            h = normalised(self.norm2, self.nonlinearity, h)
        else:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = temb.chunk(2, dim=1)
                h = normalised(self.norm2, self.nonlinearity, h, scale=scale, shift=shift)
            else:
                h = normalised(self.norm2, self.nonlinearity, h, offset=temb)
        return self.conv2(self.dropout(h))


class FoldedResnetMethod(ResnetMethod):
    """A ``ResnetBlock2D`` that doubles the resolution between its first SiLU and its first convolution."""

    option = "fold_upsample"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return super().recognises(module) and _only_doubles(module.upsample) and folds(module.conv1)

    @classmethod
    def effect(cls, module: Any) -> str:
        return f"{super().effect(module)}; {FOLDED}"

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        x, temb = super().example(module, draw)
        return draw(2, x.shape[1], 12, 12), temb

    def first_half(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not (folds(self.conv1) and _only_doubles(self.upsample)):
            return super().first_half(x)
        h = normalised(self.norm1, self.nonlinearity, x)
        return upsample_nearest(x), upsample_conv(h, self.conv1.weight, self.conv1.bias)


class UpsampleMethod(FusedBlock):
    """``Upsample2D`` with a convolution."""

    does = FOLDED
    option = "fold_upsample"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not is_diffusers(module, "Upsample2D") or module.norm is not None or module.use_conv_transpose:
            return False
        return module.use_conv and module.interpolate and folds(_conv(module))

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return (draw(1, module.channels, 15, 18),)

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        x, conv = hidden_states, _conv(self)
        doubled = output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3])
        if args or kwargs or not doubled or not folds(conv):
            return super().forward(x, output_size, *args, **kwargs)
        return upsample_conv(x, conv.weight, conv.bias)


def is_diffusers(module: Any, name: str) -> bool:
    """Whether the class is diffusers' of this name, or one made of it that computes the same way."""
    kind: Any
    for kind in type(module).__mro__:
        if kind.__name__ == name and kind.__module__.startswith("diffusers."):
            return bool(type(module).forward is kind.forward)
    return False


def _conv(upsample: Any) -> Any:
    return upsample.conv if upsample.name == "conv" else upsample.Conv2d_0


def _only_doubles(upsample: Any) -> bool:
    """Whether a resnet's ``upsample`` is nearest-neighbour ×2 and nothing else."""
    if isinstance(upsample, nn.Module):
        plain = is_diffusers(upsample, "Upsample2D") and has_no_hooks(upsample)
        return plain and not upsample.use_conv and not upsample.use_conv_transpose and upsample.norm is None
    keywords = {"scale_factor": 2.0, "mode": "nearest"}
    return getattr(upsample, "func", None) is F.interpolate and upsample.keywords == keywords


METHODS = (FoldedResnetMethod, ResnetMethod, UpsampleMethod)
