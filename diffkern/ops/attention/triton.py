"""Attention on a GPU, forward and backward, from strided views (B, heads, T, d) of whatever holds q, k and v.

Forward, a program has a block of queries of one head. Up to 256 keys their scores are on chip at once; beyond that it
takes the keys block by block. The scores are never in memory. Backward, the weights are computed again from the rows'
log-sum-exp: one kernel has blocks of queries, for dq and the rows' Σ dout·out, the next one blocks of keys, for dk and
dv. Each gradient has one writer, so two runs are bitwise equal.

16-bit operands are multiplied on tensor cores and summed in float32. Weights, which are float32, enter the second
product as two 16-bit numbers each where rows are short, where memory sets the pace anyway, and rounded to one beyond.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._triton import launch
from diffkern.ops.attention import launch_choices
from diffkern.ops.attention._triton.backward import attention_key_gradients_kernel, attention_query_gradients_kernel
from diffkern.ops.attention._triton.forward import attention_kernel
from diffkern.ops.attention.views import by_head, empty_lse, out_like, packed


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = out_like(q, q.shape[2 if channels_last else 1], channels_last)
    q, k, v = (by_head(x, num_heads, channels_last) for x in (q, k, v))
    return out, _attend(q, k, v, scale, by_head(out, num_heads, channels_last), with_lse)


def attention_qkv(
    qkv: Tensor, num_heads: int, order: str, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = out_like(qkv, qkv.shape[2 if channels_last else 1] // 3, channels_last)
    views = packed(qkv, num_heads, order, channels_last)
    return out, _attend(*views, scale, by_head(out, num_heads, channels_last), with_lse)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(out_like(x, x.shape[2 if channels_last else 1], channels_last) for x in (q, k, v))
    dout, q, k, v, out = (by_head(x, num_heads, channels_last) for x in (dout, q, k, v, out))
    _differentiate(dout, q, k, v, out, lse, scale, *(by_head(g, num_heads, channels_last) for g in grads))
    return grads[0], grads[1], grads[2]


def attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str, scale: float, channels_last: bool
) -> Tensor:
    dqkv = out_like(qkv, qkv.shape[2 if channels_last else 1], channels_last)
    dout, out = (by_head(x, num_heads, channels_last) for x in (dout, out))
    views, grads = (packed(x, num_heads, order, channels_last) for x in (qkv, dqkv))
    _differentiate(dout, *views, out, lse, scale, *grads)
    return dqkv


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, with_lse: bool) -> Tensor:
    """Writes softmax(scale·q kᵀ) v into `out`, all (B, heads, T or K, d); returns the rows' log-sum-exp."""
    lse = empty_lse(q, with_lse)
    pairs, queries, keys, head = q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3]
    blocks = launch_choices.forward(pairs, queries, keys, head, q.itemsize, q.device)
    launch.launch(
        attention_kernel,
        pairs * launch.cdiv(queries, blocks.rows),
        q.device,
        num_warps=blocks.num_warps,
        **_strided(q=q, k=k, v=v, out=out),
        **_sizes(q, k, blocks),
        largest_of=lse[0] if with_lse else None,
        rest_of=lse[1] if with_lse else None,
        blocks=launch.cdiv(queries, blocks.rows),
        scale=abs(scale),
        scale_log2=abs(scale) * math.log2(math.e),
        NEGATED=scale < 0,
        WHOLE=keys <= blocks.keys,
        PADDED=keys % blocks.keys != 0,
    )
    return lse


def _differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes the gradients of q, k and v, all (B, heads, T or K, d)."""
    pairs, queries, keys, head = q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3]
    largest, rest = lse.contiguous()
    rows: dict[str, Any] = {"largest_of": largest, "rest_of": rest, "deltas": torch.empty_like(largest)}
    shape = (pairs, queries, keys, head, q.itemsize, q.device)
    blocks = launch_choices.query_gradients(*shape)
    launch.launch(
        attention_query_gradients_kernel,
        pairs * launch.cdiv(queries, blocks.rows),
        q.device,
        num_warps=blocks.num_warps,
        **_strided(dout=dout, out=out, q=q, k=k, v=v, dq=dq),
        **_sizes(q, k, blocks),
        **rows,
        blocks=launch.cdiv(queries, blocks.rows),
        scale=scale,
        PADDED=keys % blocks.keys != 0,
    )
    blocks = launch_choices.key_gradients(*shape)
    launch.launch(
        attention_key_gradients_kernel,
        pairs * launch.cdiv(keys, blocks.keys),
        q.device,
        num_warps=blocks.num_warps,
        **_strided(dout=dout, q=q, k=k, v=v, dk=dk, dv=dv),
        **_sizes(q, k, blocks),
        **rows,
        blocks=launch.cdiv(keys, blocks.keys),
        scale=scale,
        PADDED=queries % blocks.rows != 0,
    )


def _strided(**views: Tensor) -> dict[str, Any]:
    """The kernels' arguments <name> and <name>_strides of views, and what divides all strides of samples and heads."""
    arguments: dict[str, Any] = {"ALIGNED": math.gcd(16, *(s for x in views.values() for s in x.stride()[:2]))}
    for name, x in views.items():
        arguments |= {name: x, f"{name}_strides": x.stride()}
    return arguments


def _sizes(q: Tensor, k: Tensor, blocks: launch_choices.Blocks) -> dict[str, Any]:
    """What every kernel is told of the views and its blocks."""
    return {
        "heads": q.shape[1],
        "queries": q.shape[2],
        "keys": k.shape[2],
        "PIECES": launch_choices.pieces(q.shape[3], q.itemsize),
        "HEAD": q.shape[3],
        "ROWS": blocks.rows,
        "KEYS": blocks.keys,
        "STAGES": blocks.stages,
        "PRECISION": blocks.precision,
        "SPLIT": q.itemsize == 2 and k.shape[2] <= launch_choices.SHORT,
    }


def attention_unsupported(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> str | None:
    return _unsupported(*(by_head(x, num_heads, channels_last) for x in (q, k, v)))


def attention_qkv_unsupported(
    qkv: Tensor, num_heads: int, order: str, scale: float, channels_last: bool, with_lse: bool
) -> str | None:
    return _unsupported(*packed(qkv, num_heads, order, channels_last))


def attention_backward_unsupported(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> str | None:
    return _backward_unsupported(*(by_head(x, num_heads, channels_last) for x in (q, k, v, dout, out)))


def attention_qkv_backward_unsupported(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str, scale: float, channels_last: bool
) -> str | None:
    views = packed(qkv, num_heads, order, channels_last)
    return _backward_unsupported(*views, *(by_head(x, num_heads, channels_last) for x in (dout, out)))


def _backward_unsupported(*views: Tensor) -> str | None:
    reason = _unsupported(*views)
    if reason:
        return reason
    most = launch_choices.most_channels_backward(views[0].itemsize, views[0].device)
    if views[0].shape[3] > most:
        return f"the GPU has shared memory for the gradients of {most} channels of a head in float32"
    return None


def _unsupported(*views: Tensor) -> str | None:
    if views[0].shape[3] > launch_choices.MOST_CHANNELS:
        return f"a head has more than {launch_choices.MOST_CHANNELS} channels"
    for x in views:
        reason = launch.unsupported(x)
        if reason:
            return reason
        positions = min(launch_choices.MOST_POSITIONS, x.shape[2])
        if (positions - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3) >= 2**31:
            return "a block of a head spans 2³¹ elements"
    return None
