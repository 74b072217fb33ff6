"""The norm over the channels of each pixel, with the scale-shift form and SiLU fused into it, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._affine import check_activation, check_eps, check_parameter, per_channel, statistics_dtype
from diffkern.ops._checks import check_floating
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._registry import Op
from diffkern.ops.channel_rms_norm.backward import channel_rms_norm_backward


def channel_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-12,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = act(x / max(‖x‖₂, eps)·√C·weight·(1 + scale) + shift), the norm over the C channels of a pixel.

    RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4, with eps below the norm in place of in the root) over
    axis 1: what F.normalize(x, dim=1)·weight·√C computes.

    x: (N, C, …), rank 2 to 5 (or more), float32, bfloat16, float16 or float64; contiguous, channels last, or any
        strides (then the result is contiguous).
    weight: (C,) or None. scale, shift: (N, C), or x's rank with ones after the first two axes (the first may be one
        too), any stride: chunks of one projection are not copied. Each has x's dtype or, with 16-bit x, float32.
    activation: None or "silu".
    Arithmetic in float32 (float64 for float64 x). Unlike F.normalize, a norm whose square passes float32's range is
    right too: float32 x of 1e25 gives what x of 1 gives, and x of 1e-25 with eps = 0 as well, as long as the norm
    itself lies between 1e-37 and 1e37. Returns x's dtype and memory format, also under autocast. A pixel of zeros
    gives act(shift) (NaN with eps = 0).

    Gradients flow to x, weight, scale and shift (derivation: docs/channel_rms_norm.md); where the norm is below eps it
    is a constant, and y linear in x. NaN or Inf in one pixel stays in that pixel, in y and in the gradient of x.
    Raises ValueError or TypeError naming the argument.
    """
    check_floating("x", x, min_rank=2)
    channels = x.shape[1]
    check_activation(activation)
    check_eps(eps)
    if weight is not None:
        check_parameter("weight", weight, x, (channels,))
    if scale is not None:
        scale = per_channel("scale", scale, x, channels)
    if shift is not None:
        shift = per_channel("shift", shift, x, channels)
    return OP(x, weight, float(eps), scale, shift, activation == "silu")[0]


def _fake(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return empty_like_layout(x), torch.empty((x.shape[0], 1, *x.shape[2:]), dtype=statistics_dtype(x), device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, eps, scale, shift, silu = inputs
    ctx.save_for_backward(x, weight, scale, shift, output[1])
    ctx.eps, ctx.silu = eps, silu


def _backward(ctx: Any, dy: Tensor, dnorm: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, scale, shift, norm = ctx.saved_tensors
    dx, dweight, dscale, dshift = channel_rms_norm_backward(dy, x, weight, ctx.eps, scale, shift, norm, ctx.silu)
    return dx, dweight, None, dscale, dshift, None


OP = Op(
    "channel_rms_norm(Tensor x, Tensor? weight, float eps, Tensor? scale, Tensor? shift, bool silu) -> "
    "(Tensor, Tensor)",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
