"""Linear attention with memory keys, from a packed projection: cost and memory linear in the number of pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._checks import check_device, check_floating
from diffkern.ops._registry import Op
from diffkern.ops.attention.views import accumulated_in, out_like
from diffkern.ops.linear_attention.backward import linear_attention_backward


def linear_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    memory: Tensor | None = None,
    scale: float | None = None,
    channels_last: bool = False,
) -> Tensor:
    """softmax_d(q)·scale times the context softmax_n(k) vᵀ, for each head: "efficient attention".

    Shen et al. 2018, arXiv 1812.01243, eq. 2 with softmax as normalisation (§3.2), and keys and values that belong to
    the network put before those of every sample, as denoising-diffusion-pytorch's LinearAttention has it:

        q'[d][n] = scale·softmax over d of q         k'[d][n] = softmax over n of [memory's keys, k]
        context[d][e] = Σ_n k'[d][n] v[e][n]         out[e][n] = Σ_d context[d][e] q'[d][n]

    qkv: (B, 3·heads·d, T), or (B, T, 3·heads·d) with channels_last=True, its channels in the order [q|k|v][head][d];
        float32, bfloat16, float16 or float64; any strides.
    num_heads: divides the channels; any d, T ≥ 0.
    memory: (2, heads, d, M), the keys and the values, M ≥ 1; any strides; qkv's dtype or, with 16-bit qkv, float32.
    scale: d^−1/2 if not given.
    Arithmetic in float32 (float64 for float64). Returns (B, heads·d, T) or (B, T, heads·d) of qkv's dtype and order in
    memory, also under autocast.

    Gradients flow to qkv and memory, the same bits twice and on any number of threads (derivation:
    docs/linear_attention.md). NaN and infinities as in torch.softmax: a −inf among a channel's keys has no weight, a
    channel of keys that are all −inf, or with NaN or +inf among them, makes NaN of its head in its sample, and such a q
    of its pixel. Raises ValueError or TypeError naming the argument.
    """
    check_floating("qkv", qkv)
    if qkv.dim() != 3:
        wanted = "(B, T, 3·heads·d)" if channels_last else "(B, 3·heads·d, T)"
        raise ValueError(f"qkv must have shape {wanted} with channels_last={channels_last}, got {tuple(qkv.shape)}")
    head_channels = _head_channels(num_heads, qkv.shape[2 if channels_last else 1])
    if memory is not None:
        _check_memory(memory, qkv, num_heads, head_channels)
    scale = head_channels**-0.5 if scale is None else float(scale)
    return OP(qkv, memory, num_heads, scale, channels_last)[0]


def _head_channels(num_heads: object, channels: int) -> int:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or channels < 1 or channels % (3 * num_heads):
        raise ValueError(f"3·num_heads must divide the {channels} channels, got num_heads = {num_heads}")
    return channels // (3 * num_heads)


def _check_memory(memory: object, qkv: Tensor, num_heads: int, head_channels: int) -> None:
    check_floating("memory", memory)
    assert isinstance(memory, Tensor)
    if memory.dim() != 4 or tuple(memory.shape[:3]) != (2, num_heads, head_channels) or memory.shape[3] == 0:
        raise ValueError(
            f"memory must have shape (2, {num_heads}, {head_channels}, M) with M at least 1, got {tuple(memory.shape)}"
        )
    if memory.dtype != qkv.dtype and (memory.dtype != torch.float32 or qkv.dtype == torch.float64):
        raise TypeError(f"memory must have qkv's dtype {qkv.dtype} (or float32 with 16-bit qkv), got {memory.dtype}")
    check_device("memory", memory, "qkv", qkv)


def _fake(
    qkv: Tensor, memory: Tensor | None, num_heads: int, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = qkv.shape[2 if channels_last else 1] // 3
    each = (qkv.shape[0], num_heads, channels // num_heads)
    context, k_max, k_sum = (
        qkv.new_empty(shape, dtype=accumulated_in(qkv)) for shape in ((*each, channels // num_heads), each, each)
    )
    return out_like(qkv, channels, channels_last), context, k_max, k_sum


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, memory, ctx.num_heads, ctx.scale, ctx.channels_last = inputs
    ctx.save_for_backward(qkv, memory, *output[1:])


def _backward(
    ctx: Any, dout: Tensor, dcontext: Tensor | None, dk_max: Tensor | None, dk_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    qkv, memory, context, k_max, k_sum = ctx.saved_tensors
    dqkv, dmemory = linear_attention_backward(
        dout, qkv, memory, context, k_max, k_sum, ctx.num_heads, ctx.scale, ctx.channels_last
    )
    return dqkv, dmemory, None, None, None


OP = Op(
    "linear_attention(Tensor qkv, Tensor? memory, int num_heads, float scale, bool channels_last) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
