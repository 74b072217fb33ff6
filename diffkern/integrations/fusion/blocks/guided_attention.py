"""The attention of guided-diffusion and improved-diffusion, with the norm before it and the residual behind.

As of their residual block, ``_forward`` is overridden, so that ``forward`` goes on deciding about checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as
from diffkern.integrations.fusion.submodules import (
    add_residual,
    has_kernel,
    has_no_hooks,
    is_plain,
    norm_kind,
    normalised,
    residual,
)
from diffkern.ops import attention_qkv
from diffkern.ops._layout import is_channels_last


class AttentionBlockMethod(FusedBlock):
    """``AttentionBlock``, in one, two or three dimensions, with any of its three ``attention``."""

    does = "GroupNorm, attention without copies, residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        parts = {"norm", "qkv", "attention", "proj_out"}
        if not (computes_as(module, "AttentionBlock") and parts <= set(module._modules)):
            return False
        if not (hasattr(module, "_forward") and hasattr(module, "num_heads")):
            return False
        return norm_kind(module.norm) == "group_norm" and _order(module.attention) is not None

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        return (draw(2, module.qkv.weight.shape[1], 3, 4),)

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        yield "norm", module.norm
        yield "attention", module.attention

    def _forward(self, x: Tensor) -> Tensor:
        order = _order(self.attention)
        if not (has_kernel(x) and order and has_no_hooks(self.attention)):
            return super()._forward(x)  # type: ignore[misc]
        flat = x.flatten(2)
        qkv = pointwise(self.qkv, normalised(self.norm, None, flat))
        h = attention_qkv(qkv, self.num_heads, order=order)
        return projected(self.proj_out, h, flat).unflatten(2, x.shape[2:])


def pointwise(conv: Any, x: Tensor) -> Tensor:
    """conv(x) of a convolution of one tap and x (N, C, T), in x's order in memory where the convolution is plain."""
    if not (is_channels_last(x) and _is_pointwise(conv)):
        return conv(x)
    return F.linear(x.transpose(1, 2), conv.weight[:, :, 0], conv.bias).transpose(1, 2)


def projected(conv: Any, h: Tensor, x: Tensor) -> Tensor:
    """x + conv(h), added in place as `residual` does; h and x are (N, C, T)."""
    if not (is_channels_last(h) and _is_pointwise(conv)):
        return residual(x, conv(h), conv)
    rows = F.linear(h.transpose(1, 2).flatten(0, 1), conv.weight[:, :, 0], conv.bias)
    rows = add_residual(x.transpose(1, 2).flatten(0, 1), rows, True)
    return rows.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _order(attention: Any) -> str | None:
    """The order of the projection's channels: that of improved-diffusion's ``QKVAttention`` is the legacy one."""
    orders = {"QKVAttentionLegacy": "hqkvc", "QKVAttention": "qkvhc" if hasattr(attention, "n_heads") else "hqkvc"}
    return orders.get(type(attention).__name__)


def _is_pointwise(conv: Any) -> bool:
    if not is_plain(conv, nn.Conv1d):
        return False
    return conv.kernel_size == conv.stride == (1,) and conv.groups == 1 and conv.padding == (0,)


METHODS = (AttentionBlockMethod,)
