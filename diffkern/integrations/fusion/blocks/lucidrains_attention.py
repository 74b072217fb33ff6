"""The attention of denoising-diffusion-pytorch, in one or two dimensions, with the norm before it where it has one.

Names and attributes tell it, as they tell the residual blocks of `lucidrains`. Keys and values of its own (``mem_kv``),
if it has any, go before those of the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as
from diffkern.integrations.fusion.submodules import has_kernel, has_no_hooks, norm_kind, normalised
from diffkern.ops import attention, attention_qkv


class AttentionMethod(FusedBlock):
    """``Attention``: the softmax attention of the innermost stages."""

    does = "attention without copies"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not (computes_as(module, "Attention") and {"to_qkv", "to_out"} <= set(module._modules)):
            return False
        # With more in it, as a norm of q and k, it computes something else.
        if set(module._modules) - {"norm", "attend", "to_qkv", "to_out"} or set(module._parameters) - {"mem_kv"}:
            return False
        known = norm_kind(module.norm) is not None if "norm" in module._modules else True
        return known and hasattr(module, "heads") and getattr(module.to_qkv, "weight", torch.empty(0)).dim() > 2

    @classmethod
    def effect(cls, module: Any) -> str:
        return f"norm, {cls.does}" if "norm" in module._modules else cls.does

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        weight = module.to_qkv.weight
        side = 3 if weight.shape[1] != 3 else 4  # a norm that multiplies by the width, not the channels, is to differ
        return (draw(2, weight.shape[1], *[side] * (weight.dim() - 2)),)

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        for name in ("norm", "attend"):
            if name in module._modules:
                yield name, module._modules[name]

    def forward(self, x: Tensor) -> Tensor:
        if not has_kernel(x) or not _is_plain_softmax(self._modules.get("attend")):
            return super().forward(x)
        h = normalised(self.norm, None, x) if "norm" in self._modules else x
        qkv = self.to_qkv(h).flatten(2)
        if "mem_kv" in self._parameters:
            q, k, v = qkv.chunk(3, dim=1)
            k, v = (torch.cat([_as_positions(m, q), t], dim=2) for m, t in zip(self.mem_kv, (k, v), strict=True))
            h = attention(q, k, v, self.heads, channels_last=False)
        else:
            h = attention_qkv(qkv, self.heads, order="qkvhc")
        return self.to_out(h.unflatten(2, x.shape[2:]))


def _as_positions(memory: Tensor, q: Tensor) -> Tensor:
    """Keys or values (heads, M, d) for every sample of q (N, heads·d, T), as (N, heads·d, M) in q's dtype."""
    return memory.to(q.dtype).transpose(1, 2).flatten(0, 1).expand(q.shape[0], -1, -1)


def _is_plain_softmax(attend: Any) -> bool:
    """Whether calling an ``Attend`` is softmax attention with torch's scale, and nothing else; older ones have none."""
    if attend is None:
        return True
    if attend.scale is not None or not has_no_hooks(attend) or not has_no_hooks(attend.attn_dropout):
        return False
    return not attend.training or attend.dropout == attend.attn_dropout.p == 0


METHODS = (AttentionMethod,)
