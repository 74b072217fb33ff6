"""Linear attention and its backward pass as the formulas read (docs/linear_attention.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._affine import empty_like_or_none
from diffkern.ops.attention.views import accumulated_in, by_head, out_like, packed


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of (tensor, …) with its products in the dtype that they are written in."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Any) -> Any:
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return function(x, *args)

    return run


@_without_autocast
def linear_attention(
    qkv: Tensor, memory: Tensor | None, num_heads: int, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = out_like(qkv, qkv.shape[2 if channels_last else 1] // 3, channels_last)
    q, k, v = _operands(qkv, memory, num_heads, channels_last)
    if qkv.numel() == 0:
        empty = q.new_zeros(q.shape[:3])
        return out, q.new_zeros((*q.shape[:3], q.shape[2])), empty, empty.clone()
    k_max = k.amax(-1)
    k_sum = torch.exp(k - k_max.unsqueeze(-1)).sum(-1)
    context = _weights(k, k_max, k_sum) @ v.transpose(2, 3)
    result = context.transpose(2, 3) @ (scale * q.softmax(2))
    by_head(out, num_heads, channels_last).copy_(result.transpose(2, 3))
    return out, context, k_max, k_sum


@_without_autocast
def linear_attention_backward(
    dout: Tensor,
    qkv: Tensor,
    memory: Tensor | None,
    context: Tensor,
    k_max: Tensor,
    k_sum: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    dqkv = out_like(qkv, qkv.shape[2 if channels_last else 1], channels_last)
    dmemory = empty_like_or_none(qkv, memory)
    if qkv.numel() == 0:
        return dqkv, dmemory.zero_()
    q, k, v = _operands(qkv, memory, num_heads, channels_last)
    dout = by_head(dout, num_heads, channels_last).transpose(2, 3).to(q.dtype).contiguous()
    center = context.mean(2, keepdim=True)
    center = torch.where(center.isfinite(), center, 0.0)
    context, v = context - center, v - center.transpose(2, 3)
    q = q.softmax(2)
    dq = scale * (context @ dout)
    dq = q * (dq - (q * dq).sum(2, keepdim=True))
    dcontext = scale * (q @ dout.transpose(2, 3))
    weights = _weights(k, k_max, k_sum)
    dk = dcontext @ v
    dk = weights * (dk - (weights * dk).sum(-1, keepdim=True))
    dv = dcontext.transpose(2, 3) @ weights
    first = 0
    if memory is not None:
        first = memory.shape[3]
        dmemory.copy_(torch.stack([dk[..., :first].sum(0), dv[..., :first].sum(0)]))
    gradients = (dq, dk[..., first:], dv[..., first:])
    for view, gradient in zip(packed(dqkv, num_heads, "qkvhc", channels_last), gradients, strict=True):
        view.copy_(gradient.transpose(2, 3))
    return dqkv, dmemory


def _operands(qkv: Tensor, memory: Tensor | None, num_heads: int, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, heads, d, T); k and v (B, heads, d, M + T) with those of memory in front; in the arithmetic's dtype."""
    views = packed(qkv, num_heads, "qkvhc", channels_last)
    # Contiguous, because torch sums up strided rows one value after the other.
    q, k, v = (view.transpose(2, 3).to(accumulated_in(qkv)).contiguous() for view in views)
    if memory is not None:
        remembered = memory.to(q.dtype).unsqueeze(1).expand(-1, q.shape[0], -1, -1, -1)
        k, v = (torch.cat([m, x], dim=-1) for m, x in zip(remembered.unbind(0), (k, v), strict=True))
    return q, k, v


def _weights(k: Tensor, k_max: Tensor, k_sum: Tensor) -> Tensor:
    """softmax over the last axis of k, given its maxima and sums."""
    return torch.exp(k - k_max.unsqueeze(-1)) / k_sum.unsqueeze(-1)


def linear_attention_unsupported(*args: object) -> None:
    return None


def linear_attention_backward_unsupported(*args: object) -> None:
    return None
