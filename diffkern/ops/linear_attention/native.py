"""linear_attention through csrc/cpu/linear_attention.cpp, which takes any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._affine import empty_like_or_none
from diffkern.ops._native import DTYPE_CODES, about_to_write, cpu_only, num_threads
from diffkern.ops.attention.views import by_head, out_like, packed

HeadsTuple = tuple[int, int, int, int, int, int]


def linear_attention(
    qkv: Tensor, memory: Tensor | None, num_heads: int, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = packed(qkv, num_heads, "qkvhc", channels_last)
    shape = _shape(q, memory)
    out = out_like(qkv, num_heads * shape[2], channels_last)
    context, k_max, k_sum = (
        torch.empty(size, dtype=torch.float32) for size in ((*shape[:3], shape[2]), shape[:3], shape[:3])
    )
    if qkv.numel() == 0:
        return out, context.zero_(), k_max.zero_(), k_sum.zero_()
    native_module().linear_attention(
        shape,
        *(_heads(x) for x in (q, k, v)),
        *_memory(memory),
        scale,
        _heads(by_head(about_to_write(out), num_heads, channels_last)),
        context.data_ptr(),
        k_max.data_ptr(),
        k_sum.data_ptr(),
        num_threads(qkv.numel()),
    )
    return out, context, k_max, k_sum


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
    q, k, v = packed(qkv, num_heads, "qkvhc", channels_last)
    dqkv = out_like(qkv, 3 * num_heads * q.shape[3], channels_last)
    if qkv.numel() == 0:
        return dqkv, empty_like_or_none(qkv, memory).zero_()
    dmemory = torch.empty(0 if memory is None else memory.shape, dtype=torch.float32)
    context, k_max, k_sum = context.contiguous(), k_max.contiguous(), k_sum.contiguous()
    native_module().linear_attention_backward(
        _shape(q, memory),
        *(_heads(x) for x in (q, k, v)),
        *_memory(memory),
        scale,
        context.data_ptr(),
        k_max.data_ptr(),
        k_sum.data_ptr(),
        _heads(by_head(dout, num_heads, channels_last)),
        *(_heads(x) for x in packed(about_to_write(dqkv), num_heads, "qkvhc", channels_last)),
        dmemory.data_ptr(),
        num_threads(qkv.numel()),
    )
    return dqkv, dmemory.to(qkv.dtype if memory is None else memory.dtype)


def _shape(q: Tensor, memory: Tensor | None) -> tuple[int, int, int, int, int]:
    """(samples, heads, channels of a head, positions, remembered) of the view (B, heads, T, d)."""
    samples, heads, positions, channels = q.shape
    return samples, heads, channels, positions, 0 if memory is None else memory.shape[3]


def _heads(x: Tensor) -> HeadsTuple:
    """The bindings' `heads_view` of a view (B, heads, T, d), which must outlive the call."""
    sample, head, position, channel = x.stride()
    return x.data_ptr(), DTYPE_CODES[x.dtype], sample, head, channel, position


def _memory(memory: Tensor | None) -> tuple[HeadsTuple | None, HeadsTuple | None]:
    if memory is None:
        return None, None
    head, channel, position = memory.stride()[1:]
    keys, values = ((part.data_ptr(), DTYPE_CODES[part.dtype], 0, head, channel, position) for part in memory.unbind(0))
    return keys, values


def linear_attention_unsupported(qkv: Tensor, *rest: object) -> str | None:
    return _unsupported(qkv)


def linear_attention_backward_unsupported(dout: Tensor, qkv: Tensor, *rest: object) -> str | None:
    return _unsupported(qkv)


def _unsupported(qkv: Tensor) -> str | None:
    if qkv.dtype == torch.float64:
        return "float64 arithmetic is the reference's"
    return cpu_only(qkv)
