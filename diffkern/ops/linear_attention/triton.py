"""linear_attention on a GPU.

A program has all channels of a head. Forward: chunks of the keys give sums (the context, and each channel's largest key
and sum of weights), which are joined for each head in order; then each tile of queries is multiplied with its head's
context. k, v and q are read once and the result is written once: 16 bytes a channel and position in float32, 8 in 16
bits. Backward: the same with the queries first, then the keys; dout, q, k and v are read once and three gradients are
written. Products are in float32, 4·d operations for a channel and position and pass, which memory outweighs up to heads
of 32 channels. The memory of the network is a chunk of its own, and its gradients are summed over the samples by
`column_sums`. No sum is atomic: two runs are bitwise equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._affine import empty_like_or_none
from diffkern.ops._triton import launch
from diffkern.ops._triton.columns import column_sums
from diffkern.ops.attention.views import by_head, out_like, packed
from diffkern.ops.linear_attention import launch_choices
from diffkern.ops.linear_attention._triton.backward import (
    linear_attention_join_backward_kernel,
    linear_attention_keys_backward_kernel,
    linear_attention_queries_backward_kernel,
)
from diffkern.ops.linear_attention._triton.kernels import (
    linear_attention_join_kernel,
    linear_attention_kernel,
    linear_attention_keys_kernel,
)


def linear_attention(
    qkv: Tensor, memory: Tensor | None, num_heads: int, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = packed(qkv, num_heads, "qkvhc", channels_last)[0]
    samples, _, positions, channels = q.shape
    out = out_like(qkv, num_heads * channels, channels_last)
    context, k_max, k_sum = (_float32(qkv, samples, num_heads, *rest, channels) for rest in ((channels,), (), ()))
    if qkv.numel() == 0:
        return out, context.zero_(), k_max.zero_(), k_sum.zero_()
    chosen = _choose(q, memory)
    heads = samples * num_heads
    chunks = chosen.chunks + (memory is not None)
    parts: dict[str, Any] = {
        "part_context": _float32(qkv, heads, chunks, channels, channels),
        "part_most": _float32(qkv, heads, chunks, channels),
        "part_total": _float32(qkv, heads, chunks, channels),
    }
    of_queries = {**_view("", qkv, q), "heads": num_heads, "channels": channels, "positions": positions}
    sizes: dict[str, Any] = {"LANES": chosen.lanes, "TILE": chosen.tile}
    launch.launch(
        linear_attention_keys_kernel,
        heads * chunks,
        qkv.device,
        num_warps=chosen.num_warps,
        **of_queries,
        **_memory(memory),
        **parts,
        chunks=chosen.chunks,
        all_chunks=chunks,
        chunk=chosen.chunk,
        of_memory=chosen.of_memory,
        **sizes,
    )
    launch.launch(
        linear_attention_join_kernel,
        heads,
        qkv.device,
        num_warps=chosen.num_warps,
        **parts,
        context=context,
        k_max=k_max,
        k_sum=k_sum,
        channels=channels,
        chunks=chunks,
        LANES=chosen.lanes,
    )
    launch.launch(
        linear_attention_kernel,
        heads * chosen.tiles,
        qkv.device,
        num_warps=chosen.num_warps,
        **of_queries,
        context=context,
        **_view("out", out, by_head(out, num_heads, channels_last)),
        scale=scale,
        tiles=chosen.tiles,
        **sizes,
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
    q = packed(qkv, num_heads, "qkvhc", channels_last)[0]
    samples, _, positions, channels = q.shape
    dqkv = out_like(qkv, 3 * num_heads * channels, channels_last)
    dmemory = empty_like_or_none(qkv, memory)
    if qkv.numel() == 0:
        return dqkv, dmemory.zero_()
    chosen = _choose(q, memory)
    heads = samples * num_heads
    context, k_max, k_sum = context.contiguous(), k_max.contiguous(), k_sum.contiguous()
    part_dcontext = _float32(qkv, heads, chosen.chunks, channels, channels)
    dcontext, along = _float32(qkv, heads, channels, channels), _float32(qkv, heads, channels)
    of_samples = None if memory is None else _float32(qkv, samples, memory.numel())
    dq = packed(dqkv, num_heads, "qkvhc", channels_last)[0]
    common: dict[str, Any] = {
        **_view("", qkv, q),
        **_view("dqkv", dqkv, dq),
        "context": context,
        "heads": num_heads,
        "channels": channels,
        "positions": positions,
        "LANES": chosen.lanes,
        "TILE": chosen.tile,
    }
    launch.launch(
        linear_attention_queries_backward_kernel,
        heads * chosen.chunks,
        qkv.device,
        num_warps=chosen.num_warps,
        **common,
        **_view("dout", dout, by_head(dout, num_heads, channels_last)),
        part_dcontext=part_dcontext,
        scale=scale,
        chunks=chosen.chunks,
        chunk=chosen.chunk,
    )
    launch.launch(
        linear_attention_join_backward_kernel,
        heads,
        qkv.device,
        num_warps=chosen.num_warps,
        part_dcontext=part_dcontext,
        context=context,
        dcontext=dcontext,
        along=along,
        channels=channels,
        chunks=chosen.chunks,
        LANES=chosen.lanes,
    )
    launch.launch(
        linear_attention_keys_backward_kernel,
        heads * (chosen.tiles + chosen.of_memory),
        qkv.device,
        num_warps=chosen.num_warps,
        **common,
        **_memory(memory),
        k_max=k_max,
        k_sum=k_sum,
        dcontext=dcontext,
        along=along,
        of_samples=of_samples,
        tiles=chosen.tiles,
        of_memory=chosen.of_memory,
    )
    if of_samples is not None:
        column_sums((of_samples.unsqueeze(0), dmemory))
    return dqkv, dmemory


def _choose(q: Tensor, memory: Tensor | None) -> launch_choices.Tiles:
    samples, heads, positions, channels = q.shape
    remembered = 0 if memory is None else memory.shape[3]
    return launch_choices.choose(samples * heads, channels, positions, remembered, q.device)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _view(name: str, tensor: Tensor, view: Tensor) -> dict[str, Any]:
    """The kernels' arguments <name> and its strides, of a view (B, heads, T, d) that begins where the tensor does."""
    sample, head, position, channel = view.stride()
    strides = {"sample": sample, "head": head, "channel": channel, "position": position}
    prefix = f"{name}_" if name else ""
    return {name or "qkv": tensor, **{f"{prefix}{axis}": stride for axis, stride in strides.items()}}


def _memory(memory: Tensor | None) -> dict[str, Any]:
    """The kernels' arguments memory, its strides, and how many it holds."""
    part, head, channel, position = (0, 0, 0, 0) if memory is None else memory.stride()
    return {
        "memory": memory,
        "memory_part": part,
        "memory_head": head,
        "memory_channel": channel,
        "memory_position": position,
        "remembered": 0 if memory is None else memory.shape[3],
    }


def linear_attention_unsupported(
    qkv: Tensor, memory: Tensor | None, num_heads: int, scale: float, channels_last: bool
) -> str | None:
    return _unsupported(qkv, num_heads, channels_last)


def linear_attention_backward_unsupported(
    dout: Tensor,
    qkv: Tensor,
    memory: Tensor | None,
    context: Tensor,
    k_max: Tensor,
    k_sum: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> str | None:
    return _unsupported(qkv, num_heads, channels_last)


def _unsupported(qkv: Tensor, num_heads: int, channels_last: bool) -> str | None:
    if qkv.shape[2 if channels_last else 1] > 3 * num_heads * launch_choices.MOST_LANES:
        return f"a head has more than {launch_choices.MOST_LANES} channels"
    return launch.unsupported(qkv)
