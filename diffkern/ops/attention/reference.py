"""Attention and its backward pass as the formulas read (docs/attention.md): the scores in memory, whole."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops.attention.views import (
    accumulated_in,
    by_head,
    empty_lse,
    out_like,
    packed,
    separate,
    without_autocast,
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = out_like(q, q.shape[2 if channels_last else 1], channels_last)
    views = separate(q, k, v, num_heads, channels_last)
    return out, _attend(*views, scale, by_head(out, num_heads, channels_last), with_lse)


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
    channels = q.shape[2 if channels_last else 1]
    dq, dk, dv = (out_like(x, channels, channels_last) for x in (q, k, v))
    dout, out = by_head(dout, num_heads, channels_last), by_head(out, num_heads, channels_last)
    views, grads = (separate(*three, num_heads, channels_last) for three in ((q, k, v), (dq, dk, dv)))
    _differentiate(dout, *views, out, lse, scale, *grads)
    return dq, dk, dv


def attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str, scale: float, channels_last: bool
) -> Tensor:
    dqkv = out_like(qkv, qkv.shape[2 if channels_last else 1], channels_last)
    dout, out = by_head(dout, num_heads, channels_last), by_head(out, num_heads, channels_last)
    views, grads = (packed(x, num_heads, order, channels_last) for x in (qkv, dqkv))
    _differentiate(dout, *views, out, lse, scale, *grads)
    return dqkv


@without_autocast
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, with_lse: bool) -> Tensor:
    """Writes softmax(scale·q kᵀ) v into `out`, all (B, heads, T or K, d); returns the rows' log-sum-exp."""
    if not out.numel():
        return empty_lse(q, with_lse)
    scores = _scores(q, k, scale)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
    total = weights.sum(-1, keepdim=True)
    out.copy_(weights @ v.to(scores.dtype) / torch.where(total == 0, 1.0, total))
    lse = empty_lse(q, with_lse)
    if with_lse:
        lse[0], lse[1] = largest.squeeze(-1), torch.where(total == 0, 0.0, total.log()).squeeze(-1)
    return lse


@without_autocast
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
    largest, rest = lse.unsqueeze(-1)
    weights = torch.exp(_scores(q, k, scale) - torch.where(largest == -torch.inf, 0.0, largest) - rest)
    q, k, v, dout, out = (x.to(weights.dtype) for x in (q, k, v, dout, out))
    dweights = dout @ v.transpose(2, 3)
    dscores = scale * weights * (dweights - (dout * out).sum(-1, keepdim=True))
    dq.copy_(dscores @ k)
    dk.copy_(dscores.transpose(2, 3) @ q)
    dv.copy_(weights.transpose(2, 3) @ dout)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * (q.to(accumulated_in(q)) @ k.to(accumulated_in(k)).transpose(2, 3))


def attention_unsupported(*args: object) -> None:
    return None


def attention_qkv_unsupported(*args: object) -> None:
    return None


def attention_backward_unsupported(*args: object) -> None:
    return None


def attention_qkv_backward_unsupported(*args: object) -> None:
    return None
