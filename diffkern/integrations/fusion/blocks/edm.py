"""The block of EDM's networks, and their convolution. Nothing here imports EDM.

EDM's layers cast their parameters to what they are given, and its networks come as pickles that bring the source of
their classes along: names and attributes tell them, not modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.integrations.fusion.blocks.upsample import EFFECT as FOLDED
from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as
from diffkern.integrations.fusion.submodules import has_kernel, has_no_hooks, norm_kind, normalised
from diffkern.nn.resample import upsample_conv
from diffkern.ops import attention_qkv


class UNetBlockMethod(FusedBlock):
    """``UNetBlock`` of ``SongUNet`` and ``DhariwalUNet``, with or without self-attention."""

    does = "GroupNorm and SiLU twice"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        parts = {"norm0", "conv0", "affine", "norm1", "conv1"}
        settings = ("dropout", "skip_scale", "adaptive_scale", "num_heads", "skip")
        if not (computes_as(module, "UNetBlock") and parts <= set(module._modules)):
            return False
        known = norm_kind(module.norm0) == norm_kind(module.norm1) == "group_norm"
        return known and all(hasattr(module, name) for name in settings)

    @classmethod
    def effect(cls, module: Any) -> str:
        time = "scale and shift" if module.adaptive_scale else "offset"
        return f"{cls.does}, noise {time}{'; attention' if module.num_heads else ''}"

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return draw(2, module.conv0.in_channels, 4, 4), draw(2, module.affine.in_features)

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        for name in ("norm0", "norm1", *(["norm2"] if module.num_heads else [])):
            yield name, module._modules[name]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not has_kernel(x):
            return super().forward(x, emb)
        h = self.conv0(normalised(self.norm0, F.silu, x))
        return self.second_half(h, emb, lambda: x if self.skip is None else self.skip(x))

    def second_half(self, h: Tensor, emb: Tensor, shortcut: Callable[[], Tensor]) -> Tensor:
        """From the first convolution's output on; ``shortcut`` makes what is added, which happens late."""
        projection = self.affine(emb).to(h.dtype)
        if self.adaptive_scale:
            scale, shift = projection.chunk(2, dim=1)
            h = normalised(self.norm1, F.silu, h, scale=scale, shift=shift)
        else:
            h = normalised(self.norm1, F.silu, h, offset=projection)
        h = self.conv1(F.dropout(h, p=self.dropout, training=self.training))
        h = self.added(h, shortcut(), self.conv1)
        return self.attended(h) if self.num_heads else h

    def attended(self, x: Tensor) -> Tensor:
        """Self-attention over all positions, of channels [head][channel][q, k, v], added to x."""
        qkv = self.qkv(normalised(self.norm2, None, x)).flatten(2)
        h = attention_qkv(qkv, self.num_heads, order="hcqkv").unflatten(2, x.shape[2:])
        if x.is_contiguous():
            h = h.contiguous()  # as the convolution's weights may have made it channels last, and all that follows
        return self.added(self.proj(h), x, self.proj)

    def added(self, h: Tensor, x: Tensor, maker: nn.Module) -> Tensor:
        """(h + x)·skip_scale, the sum written into h as in the original; the product, too, if no hook has seen h."""
        h = h.add_(x)
        if self.skip_scale == 1:
            return h
        return h.mul_(self.skip_scale) if has_no_hooks(maker) else h * self.skip_scale


class UpsampleConvMethod(FusedBlock):
    """``Conv2d`` after an upsampling with the filter [1, 1], which is nearest neighbour."""

    does = FOLDED
    option = "fold_upsample"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not (computes_as(module, "Conv2d") and getattr(module, "up", False) and not module.fused_resample):
            return False
        taps = module.resample_filter
        nearest = taps.numel() == 4 and bool((taps == 0.25).all())
        return nearest and module.weight is not None and module.weight.shape[-1] == 3

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return (draw(1, module.in_channels, 15, 18),)  # as many pixels as it takes to be folded

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return upsample_conv(x, self.weight.to(x.dtype), bias)


METHODS = (UNetBlockMethod, UpsampleConvMethod)
