"""Softmax attention over the pixels of a feature map, from packed or separate projections, without copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._checks import check_device, check_floating
from diffkern.ops._registry import Op, in_transform
from diffkern.ops.attention import choice
from diffkern.ops.attention.backward import attention_backward, attention_qkv_backward
from diffkern.ops.attention.views import ORDERS, empty_lse, out_like, packed


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, scale: float | None = None, channels_last: bool = True
) -> Tensor:
    """softmax(scale·q kᵀ) v for each head (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    q: (B, T, heads·d), or (B, heads·d, T) with channels_last=False; k, v: (B, K, heads·d), or (B, heads·d, K). Head h
        has the channels h·d … h·d + d − 1. float32, bfloat16, float16 or float64, all of one dtype; any strides.
    num_heads divides the channels; any d, T ≥ 0, K ≥ 1. scale: d^−1/2 if not given.
    Scores, softmax and sums in float32 (float64 for float64). Returns q's shape, dtype and order in memory.

    Gradients flow to q, k and v (derivation: docs/attention.md), the same bits twice. NaN and infinities as in
    F.scaled_dot_product_attention: a row whose scores are all −inf gives 0, one with +inf or NaN gives NaN, and what is
    not finite in one head of one sample stays there. Raises ValueError or TypeError naming the argument.
    """
    check_floating("q", q)
    _check_rank("q", q, channels_last, "heads·d")
    for name, x in (("k", k), ("v", v)):
        check_floating(name, x)
        _check_key_or_value(name, x, q, k, channels_last)
    channels = q.shape[2 if channels_last else 1]
    scale = _scale(num_heads, scale, channels, 1)
    with_lse = _differentiated(q, k, v)
    return OP(q, k, v, num_heads, scale, channels_last, with_lse)[0]


def attention_qkv(
    qkv: Tensor, num_heads: int, *, order: str = "hqkvc", scale: float | None = None, channels_last: bool = False
) -> Tensor:
    """Self-attention, softmax(scale·q kᵀ) v for each head, with q, k and v packed in one projection.

    qkv: (B, 3·heads·d, T), or (B, T, 3·heads·d) with channels_last=True; float32, bfloat16, float16 or float64; any
        strides.
    order: how the channels are read, slowest index first:

    - "hqkvc": [head][q|k|v][channel], improved-diffusion and guided-diffusion's legacy order;
    - "qkvhc": [q|k|v][head][channel], guided-diffusion's new order and denoising-diffusion-pytorch;
    - "hcqkv": [head][channel][q|k|v], EDM.

    The channels of the result are [head][channel], its shape (B, heads·d, T) or (B, T, heads·d), its dtype and its
    order in memory those of qkv. Everything else is as in `attention`. Raises ValueError or TypeError naming the
    argument.
    """
    check_floating("qkv", qkv)
    _check_rank("qkv", qkv, channels_last, "3·heads·d")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    scale = _scale(num_heads, scale, qkv.shape[2 if channels_last else 1], 3)
    return QKV_OP(qkv, num_heads, order, scale, channels_last, _differentiated(qkv))[0]


def _check_rank(name: str, x: Tensor, channels_last: bool, channels: str) -> None:
    if x.dim() != 3:
        wanted = f"(B, T, {channels})" if channels_last else f"(B, {channels}, T)"
        raise ValueError(f"{name} must have shape {wanted} with channels_last={channels_last}, got {tuple(x.shape)}")


def _check_key_or_value(name: str, x: Tensor, q: Tensor, k: Tensor, channels_last: bool) -> None:
    batch, channels = q.shape[0], q.shape[2 if channels_last else 1]
    length: Any = "K" if name == "k" else k.shape[1 if channels_last else 2]
    wanted = (batch, length, channels) if channels_last else (batch, channels, length)
    if x.dim() != 3 or any(size != asked for size, asked in zip(x.shape, wanted, strict=True) if asked != "K"):
        raise ValueError(
            f"{name} must have shape ({', '.join(map(str, wanted))}) to go with q of shape {tuple(q.shape)}, "
            f"got {tuple(x.shape)}"
        )
    if x.shape[1 if channels_last else 2] == 0:
        raise ValueError(f"{name} must have at least one position, got shape {tuple(x.shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    check_device(name, x, "q", q)


def _scale(num_heads: int, scale: float | None, channels: int, parts: int) -> float:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or channels < 1 or channels % (parts * num_heads):
        times = f"{parts}·" if parts > 1 else ""
        raise ValueError(f"{times}num_heads must divide the {channels} channels, got num_heads = {num_heads}")
    return (channels // (parts * num_heads)) ** -0.5 if scale is None else float(scale)


def _differentiated(*operands: Tensor) -> bool:
    """Whether a backward pass may follow, which needs the rows' log-sum-exp."""
    return in_transform() or (torch.is_grad_enabled() and any(x.requires_grad for x in operands))


def _fake(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = out_like(q, q.shape[2 if channels_last else 1], channels_last)
    rows = q.new_empty((q.shape[0], num_heads, q.shape[1 if channels_last else 2], 0))
    return out, empty_lse(rows, with_lse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.num_heads, ctx.scale, ctx.channels_last, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    grads = attention_backward(dout, q, k, v, out, lse, ctx.num_heads, ctx.scale, ctx.channels_last)
    return *grads, None, None, None, None


def _preference(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> tuple[str, ...]:
    length = 1 if channels_last else 2
    return choice.preference(q, q.shape[3 - length] // num_heads, q.shape[length] * k.shape[length])


def _qkv_fake(
    qkv: Tensor, num_heads: int, order: str, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = out_like(qkv, qkv.shape[2 if channels_last else 1] // 3, channels_last)
    return out, empty_lse(packed(qkv, num_heads, order, channels_last)[0], with_lse)


def _qkv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.order, ctx.scale, ctx.channels_last, _ = inputs
    ctx.save_for_backward(qkv, *output)


def _qkv_backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse = ctx.saved_tensors
    grad = attention_qkv_backward(dout, qkv, out, lse, ctx.num_heads, ctx.order, ctx.scale, ctx.channels_last)
    return grad, None, None, None, None, None


def _qkv_preference(
    qkv: Tensor, num_heads: int, order: str, scale: float, channels_last: bool, with_lse: bool
) -> tuple[str, ...]:
    length = 1 if channels_last else 2
    return choice.preference(qkv, qkv.shape[3 - length] // (3 * num_heads), qkv.shape[length] ** 2)


OP = Op(
    "attention(Tensor q, Tensor k, Tensor v, int num_heads, float scale, bool channels_last, bool with_lse) -> "
    "(Tensor, Tensor)",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    preference=choice.OURS,
    preference_for=_preference,
)
QKV_OP = Op(
    "attention_qkv(Tensor qkv, int num_heads, str order, float scale, bool channels_last, bool with_lse) -> "
    "(Tensor, Tensor)",
    package=__package__,
    fake=_qkv_fake,
    setup_context=_qkv_setup_context,
    backward=_qkv_backward,
    preference=choice.OURS,
    preference_for=_qkv_preference,
)
