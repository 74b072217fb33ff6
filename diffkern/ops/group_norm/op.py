"""GroupNorm with the scale-shift form and SiLU fused into it, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._affine import check_activation, check_eps, check_parameter, per_channel, statistics_dtype
from diffkern.ops._checks import check_device, check_floating
from diffkern.ops._layout import empty_like_layout, empty_with_channels
from diffkern.ops._registry import Op
from diffkern.ops.group_norm import eager
from diffkern.ops.group_norm.backward import group_norm_backward


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = act(GN(x)·(1 + scale) + shift), GN(x) = (x − μ)/√(σ² + eps)·weight + bias per group (Wu & He 2018, eq. 7).

    With skip and offset it is GN(cat([x, skip], 1) + offset), without making either: the joined input of a U-Net's
    decoder, and the time embedding's projection that is added before a norm (Ho et al. 2020, arXiv 2006.11239).

    x: (N, C, …), rank 2 to 5 (or more), float32, bfloat16, float16 or float64; contiguous, channels last, or any
        strides (then the result is contiguous). num_groups divides C; any number of channels a group.
    skip: (N, C2, …) like x in dtype and all other axes, any strides: its channels follow x's, a group may have some of
        both, and C is their number together, in the result and everywhere below. The memory format is x's.
    weight, bias: (C,) or None. offset, scale, shift: (N, C), or x's rank with ones after the first two axes (the first
        may be one too), any stride: chunks of one projection are not copied. Each has x's dtype or, with 16-bit x,
        float32.
    activation: None or "silu".
    Statistics and arithmetic in float32 (float64 for float64 x), by Chan's combination of shifted sums: right at a mean
    of 1e3 and beyond. Returns x's dtype and memory format, also under autocast. One value per group is defined
    (its normalised value is 0), unlike F.group_norm at N = 1.

    Gradients flow to x, skip, weight, bias, offset, scale and shift (derivation: docs/group_norm.md); NaN or Inf in one
    sample stays in that sample, in y and in the gradients of x and skip. Raises ValueError or TypeError naming the
    argument.
    """
    if skip is None and (activation is None or activation == "silu"):
        y = eager.group_norm(x, num_groups, weight, bias, eps, scale, shift, offset, activation is not None)
        if y is not None:
            return y
    check_floating("x", x, min_rank=2)
    channels = x.shape[1]
    if skip is not None:
        _check_skip(skip, x)
        channels += skip.shape[1]
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1 or channels % num_groups:
        whose = "x's" if skip is None else "x's and skip's"
        raise ValueError(
            f"num_groups must be a positive int that divides {whose} {channels} channels, got {num_groups!r}"
        )
    check_activation(activation)
    check_eps(eps)
    if weight is not None:
        check_parameter("weight", weight, x, (channels,))
    if bias is not None:
        check_parameter("bias", bias, x, (channels,))
    if scale is not None:
        scale = per_channel("scale", scale, x, channels)
    if shift is not None:
        shift = per_channel("shift", shift, x, channels)
    if offset is not None:
        offset = per_channel("offset", offset, x, channels)
    return OP(x, num_groups, weight, bias, float(eps), scale, shift, activation == "silu", skip, offset)[0]


def _check_skip(skip: Tensor, x: Tensor) -> None:
    check_floating("skip", skip, min_rank=2)
    if skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
        wanted = ", ".join(map(str, (x.shape[0], "C2", *x.shape[2:])))
        raise ValueError(f"skip must have shape ({wanted}) to go with x, got {tuple(skip.shape)}")
    if skip.dtype != x.dtype:
        raise TypeError(f"skip must have x's dtype {x.dtype}, got {skip.dtype}")
    check_device("skip", skip, "x", x)


def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], num_groups), dtype=statistics_dtype(x))
    y = empty_like_layout(x) if skip is None else empty_with_channels(x, x.shape[1] + skip.shape[1])
    return y, statistics, torch.empty_like(statistics)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, num_groups, weight, bias, _, scale, shift, silu, skip, offset = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1], output[2], skip, offset)
    ctx.num_groups, ctx.silu = num_groups, silu


def _backward(ctx: Any, dy: Tensor, dmean: Tensor | None, drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift, mean, rstd, skip, offset = ctx.saved_tensors
    dx, dweight, dbias, dscale, dshift, dskip, doffset = group_norm_backward(
        dy, x, weight, bias, scale, shift, mean, rstd, ctx.num_groups, ctx.silu, skip, offset
    )
    return dx, None, dweight, dbias, None, dscale, dshift, None, dskip, doffset


OP = Op(
    "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, "
    "bool silu, Tensor? skip=None, Tensor? offset=None) -> (Tensor, Tensor, Tensor)",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
