"""channel_rms_norm on a GPU.

A program has all channels of a few pixels in its registers: x is read once and y written once, 8 bytes an element in
float32 and 4 in 16 bits, and a float32 norm a pixel. Pixels whose sum of squares leaves float32's range have it taken
again, scaled, in programs that meet any. The backward pass reads x and dy once and writes dx, 12 or 6 bytes an element;
a program goes over several tiles of pixels, so that the workspace of its sums for the parameters stays small, and
`column_sums` adds them up in order: no sum is atomic, two runs are bitwise equal. All of it is bound by memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._affine import empty_like_or_none
from diffkern.ops._layout import sample_shape
from diffkern.ops._triton import launch
from diffkern.ops._triton.channels import per_channel, per_sample
from diffkern.ops._triton.columns import column_sums
from diffkern.ops.channel_rms_norm import launch_choices
from diffkern.ops.channel_rms_norm._triton.kernels import channel_rms_norm_backward_kernel, channel_rms_norm_kernel


def channel_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    samples, channels, pixels, channels_last = sample_shape(x)
    x = x if channels_last else x.contiguous()
    y = torch.empty_like(x)
    norm = torch.empty((samples, 1, *x.shape[2:]), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, norm.zero_()
    chosen = launch_choices.forward(channels, pixels, x.itemsize, channels_last)
    launch.launch(
        channel_rms_norm_kernel,
        samples * chosen.chunks,
        x.device,
        num_warps=chosen.num_warps,
        x=x,
        **per_channel(weight=weight),
        **per_sample(scale=scale, shift=shift),
        y=y,
        norm_out=norm,
        **_shape_arguments(x, eps, silu, chosen),
    )
    return y, norm


def channel_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, channels, pixels, channels_last = sample_shape(x)
    x = x if channels_last else x.contiguous()
    dx = torch.empty_like(x)
    grads = [empty_like_or_none(x, parameter) for parameter in (weight, scale, shift)]
    if x.numel() == 0:
        return dx, grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    dy = dy.to(x.dtype)
    dy = dy.movedim(1, -1).contiguous() if channels_last else dy.contiguous()
    chosen = launch_choices.backward(samples, channels, pixels, x.itemsize, channels_last, x.device)
    of_weight, of_scale, of_shift = (
        None
        if parameter is None
        else torch.empty(samples, chosen.chunks, channels, dtype=torch.float32, device=x.device)
        for parameter in (weight, scale, shift)
    )
    launch.launch(
        channel_rms_norm_backward_kernel,
        samples * chosen.chunks,
        x.device,
        num_warps=chosen.num_warps,
        x=x,
        dy=dy,
        norm_in=norm.contiguous(),
        **per_channel(weight=weight),
        **per_sample(scale=scale, shift=shift),
        dx=dx,
        of_weight=of_weight,
        of_scale=of_scale,
        of_shift=of_shift,
        tiles=chosen.tiles,
        SUMS=not (weight is scale is shift is None),
        **_shape_arguments(x, eps, silu, chosen),
    )
    if of_weight is not None:
        column_sums((of_weight.flatten(0, 1).unsqueeze(0), grads[0]))
    column_sums(*((sums, grad) for sums, grad in ((of_scale, grads[1]), (of_shift, grads[2])) if sums is not None))
    return dx, grads[0], grads[1], grads[2]


def _shape_arguments(x: Tensor, eps: float, silu: bool, chosen: launch_choices.Rows) -> dict[str, Any]:
    _, channels, pixels, channels_last = sample_shape(x)
    return {
        "eps": eps,
        "root": channels**0.5,
        "pixels": pixels,
        "channels": channels,
        "chunks": chosen.chunks,
        "LANES": chosen.lanes,
        "ROWS": chosen.rows,
        "CHANNELS_LAST": channels_last,
        "SILU": silu,
    }


def channel_rms_norm_unsupported(x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def channel_rms_norm_backward_unsupported(dy: Tensor, x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def _unsupported(x: Tensor) -> str | None:
    if x.shape[1] > launch_choices.MOST_LANES:
        return f"a pixel has more than {launch_choices.MOST_LANES} channels"
    return launch.unsupported(x)
