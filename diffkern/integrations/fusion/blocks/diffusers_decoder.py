"""The option virtual_concat in diffusers: decoders' blocks that leave their skip connections where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.fusion.blocks.diffusers import ResnetMethod, is_diffusers
from diffkern.integrations.fusion.method import Draw, FusedBlock
from diffkern.integrations.fusion.submodules import (
    can_split,
    formatted_for,
    has_kernel,
    has_no_hooks,
    is_plain_norm,
    normalised,
    residual,
    split_conv,
)


class UpBlockMethod(FusedBlock):
    """``UpBlock2D``: residual blocks, each of which is given a skip connection too."""

    does = "virtual_concat: the first norms and the shortcuts read the skip connections where they lie"
    option = "virtual_concat"
    around_fused = True
    name = "UpBlock2D"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_diffusers(module, cls.name) and all(isinstance(r, ResnetMethod) for r in module.resnets)

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        resnets = list(module.resnets)
        of_first = resnets[0].in_channels - resnets[0].in_channels // 3
        widths = [of_first, *(resnet.out_channels for resnet in resnets[:-1])]
        skips = [draw(2, r.in_channels - width, 4, 4) for r, width in zip(resnets, widths, strict=True)]
        projection = resnets[0].time_emb_proj
        temb = None if projection is None else draw(2, projection.in_features)
        return draw(2, of_first, 4, 4), tuple(reversed(skips)), temb

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Any = None,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        if not self.takes(hidden_states) or len(args) > 1 or kw.keys() - {"upsample_size"}:
            return super().forward(hidden_states, res_hidden_states_tuple, temb, *args, **kw)
        h = hidden_states
        for resnet, skip in zip(self.resnets, reversed(res_hidden_states_tuple), strict=False):
            h = joined(resnet, h, skip, temb)
        return self.upsampled(h, *args, **kw)

    def takes(self, h: Tensor) -> bool:
        """Whether the blocks are run here: not with checkpointing, nor FreeU, which edits the skip connections."""
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        freeu = all(getattr(self, name, None) for name in ("s1", "s2", "b1", "b2"))
        return has_kernel(h) and not checkpointing and not freeu

    def upsampled(self, h: Tensor, upsample_size: Any = None) -> Tensor:
        for upsampler in self.upsamplers or ():
            h = upsampler(h, upsample_size)
        return h


class AttnUpBlockMethod(UpBlockMethod):
    """``AttnUpBlock2D``: with self-attention after each residual block."""

    name = "AttnUpBlock2D"

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Any = None,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        if not self.takes(hidden_states) or len(args) > 1 or kw.keys() - {"upsample_size"}:
            return super(UpBlockMethod, self).forward(hidden_states, res_hidden_states_tuple, temb, *args, **kw)
        h = hidden_states
        for resnet, attn, skip in zip(self.resnets, self.attentions, reversed(res_hidden_states_tuple), strict=False):
            h = attn(joined(resnet, h, skip, temb))
        for upsampler in self.upsamplers or ():
            h = upsampler(h, temb=temb) if self.upsample_type == "resnet" else upsampler(h)
        return h


class CrossAttnUpBlockMethod(UpBlockMethod):
    """``CrossAttnUpBlock2D``: with a transformer after each residual block."""

    name = "CrossAttnUpBlock2D"

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        widths = (inner.cross_attention_dim for inner in module.attentions.modules() if _is_cross_attention(inner))
        return (*super().example(module, draw), draw(2, 5, next(widths)))

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Any = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if not self.takes(hidden_states) or (cross_attention_kwargs or {}).get("scale") is not None:
            forward = super(UpBlockMethod, self).forward
            return forward(hidden_states, res_hidden_states_tuple, temb, upsample_size=upsample_size, **conditions)
        h = hidden_states
        for resnet, attn, skip in zip(self.resnets, self.attentions, reversed(res_hidden_states_tuple), strict=False):
            h = attn(joined(resnet, h, skip, temb), **conditions, return_dict=False)[0]
        return self.upsampled(h, upsample_size)


def joined(resnet: Any, h: Tensor, skip: Tensor, temb: Any) -> Tensor:
    """resnet(cat([h, skip], 1), temb), without concatenating where calling the resnet would do nothing else."""
    shortcut = resnet.conv_shortcut
    if not (
        isinstance(resnet, ResnetMethod)
        and has_no_hooks(resnet)
        and is_plain_norm(resnet.norm1)
        and can_split(shortcut)
        and resnet.upsample is resnet.downsample is None
        and h.dtype == skip.dtype == shortcut.weight.dtype
        and (temb is None) == (resnet.time_emb_proj is None)
    ):
        return resnet(torch.cat([h, skip], 1), temb)
    h = formatted_for(skip, h)
    y = resnet.conv1(normalised(resnet.norm1, resnet.nonlinearity, h, skip=skip))
    y = resnet.second_half(y, temb)
    return residual(split_conv(shortcut, h, skip), y, resnet.conv2, resnet.output_scale_factor)


def _is_cross_attention(module: Any) -> bool:
    return getattr(module, "is_cross_attention", False) is True


METHODS = (UpBlockMethod, AttnUpBlockMethod, CrossAttnUpBlockMethod)
