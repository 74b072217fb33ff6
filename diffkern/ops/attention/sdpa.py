"""Attention through torch's scaled_dot_product_attention: where it is the faster one (choice.py), without gradients.

It wants the channels of a head side by side, so packed and channels-first operands are copied first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diffkern.ops.attention.views import by_head, empty_lse, out_like, packed, separate, without_autocast


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = out_like(q, q.shape[2 if channels_last else 1], channels_last)
    views = separate(q, k, v, num_heads, channels_last)
    return out, _attend(*views, scale, by_head(out, num_heads, channels_last))


def attention_qkv(
    qkv: Tensor, num_heads: int, order: str, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = out_like(qkv, qkv.shape[2 if channels_last else 1] // 3, channels_last)
    views = packed(qkv, num_heads, order, channels_last)
    return out, _attend(*views, scale, by_head(out, num_heads, channels_last))


@without_autocast
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> Tensor:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale))
    return empty_lse(q, False)


def attention_unsupported(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> str | None:
    return _unsupported(with_lse)


def attention_qkv_unsupported(
    qkv: Tensor, num_heads: int, order: str, scale: float, channels_last: bool, with_lse: bool
) -> str | None:
    return _unsupported(with_lse)


def _unsupported(with_lse: bool) -> str | None:
    if with_lse:
        return "its backward pass is not everywhere the same twice, and it keeps the rows' sums to itself"
    return None
