"""The residual block of diffusers, and the joining of skip connections in its decoders' blocks.

Nothing here imports diffusers; the classes that are swapped in stand in `diffusers_classes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffkern.integrations.fusion.method import Draw, FusedBlock
from diffkern.integrations.fusion.submodules import has_kernel, normalised, residual


class ResnetMethod(FusedBlock):
    """``ResnetBlock2D``: of UNet2DModel, UNet2DConditionModel, ControlNetModel, AutoencoderKL and others."""

    does = "GroupNorm and SiLU twice, residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return _is(module, "ResnetBlock2D") and hasattr(module, "time_embedding_norm")

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
        x, h = input_tensor, normalised(self.norm1, self.nonlinearity, input_tensor)
        for resample in (self.upsample, self.downsample):
            if resample is None:
                continue
            if resample is self.upsample and len(h) >= 64:  # as diffusers: channels-last upsampling fails for many
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        return self.second_half(x, self.conv1(h), temb)

    def second_half(self, x: Tensor, h: Tensor, temb: Tensor | None) -> Tensor:
        """From the first convolution's output to the block's."""
        h = self.conv2(self.dropout(self.conditioned(h, temb)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return residual(x, h, self.conv2, self.output_scale_factor)

    def conditioned(self, h: Tensor, temb: Any) -> Tensor:
        """The second norm with the time embedding, and its SiLU."""
        if temb is None:
            return normalised(self.norm2, self.nonlinearity, h)
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            return normalised(self.norm2, self.nonlinearity, h, scale=scale, shift=shift)
        return normalised(self.norm2, self.nonlinearity, h, offset=temb)


def _is(module: Any, name: str) -> bool:
    """Whether the class is diffusers' of this name, or one made of it that computes the same way."""
    kind: Any
    for kind in type(module).__mro__:
        if kind.__name__ == name and kind.__module__.startswith("diffusers."):
            return bool(type(module).forward is kind.forward)
    return False


METHODS = (ResnetMethod,)
