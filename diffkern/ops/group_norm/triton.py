"""group_norm on a GPU.

A program has a slab: the pixels of one sample in a slice of the channels, which is a whole number of groups. Where the
slab fits in its registers, x is read once and y written once, 8 bytes an element in float32 and 4 in 16 bits. Else
programs take chunks of the slab's pixels, in two launches: one leaves each chunk's mean and centred squares in a
workspace with one writer each, the other joins them in a fixed order and normalises, and x is read twice, in part from
the second-level cache. SiLU and the modulation are in the same affine. Both memory formats have the same kernels: tiles
of pixels × channels, whose addresses differ.

The backward pass holds x and dy in the same way, and leaves each sample's sums for the parameters in a workspace that
`column_sums` adds up in order. No sum is atomic: two runs are bitwise equal. All of it is bound by memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._affine import empty_like_or_none
from diffkern.ops._layout import empty_with_channels, in_layout_of, sample_shape
from diffkern.ops._triton import launch
from diffkern.ops._triton.channels import per_channel, per_sample
from diffkern.ops._triton.columns import column_sums
from diffkern.ops.group_norm import launch_choices
from diffkern.ops.group_norm._triton.backward import (
    group_norm_backward_apply_kernel,
    group_norm_backward_kernel,
    group_norm_backward_partials_kernel,
)
from diffkern.ops.group_norm._triton.forward import (
    group_norm_apply_kernel,
    group_norm_kernel,
    group_norm_partials_kernel,
)


def group_norm(
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
    samples, x_channels, pixels, channels_last = sample_shape(x)
    x = x if channels_last else x.contiguous()
    channels = x_channels if skip is None else x_channels + skip.shape[1]
    skip = None if skip is None else in_layout_of(skip, x)
    y = empty_with_channels(x, channels)
    mean = torch.empty(samples, num_groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    per_group = channels // num_groups
    # An offset and the planes of a second tensor take registers too, as many as a second value of each element.
    tensors = 1 if channels_last or (skip is None and offset is None) else 2
    slabs = launch_choices.choose(samples, num_groups, per_group, pixels, x.itemsize, channels_last, x.device, tensors)
    arguments = _slab_arguments(slabs, x, skip, num_groups)
    modulation = per_channel(weight=weight, bias=bias) | per_sample(scale=scale, shift=shift)
    results: dict[str, Any] = {
        "y": y,
        "mean_out": mean,
        "rstd_out": rstd,
        "eps": eps,
        "values": float(per_group * pixels),
    }
    programs = samples * (channels // slabs.width) * slabs.chunks
    how: dict[str, Any] = {"num_warps": slabs.num_warps, "registers": slabs.registers}
    if slabs.resident:
        launch.launch(
            group_norm_kernel,
            programs,
            x.device,
            **how,
            **arguments,
            **modulation,
            **per_sample(offset=offset),
            **results,
            SILU=silu,
            PADDED=slabs.rows != pixels,
            ONE_GROUP=slabs.width == per_group,
        )
        return y, mean, rstd
    arguments |= {"chunks": slabs.chunks, "tiles": slabs.tiles, **per_sample(offset=offset)}
    partials = torch.empty(2, samples, num_groups, slabs.chunks, dtype=torch.float32, device=x.device)
    arguments |= {"means": partials[0], "squares": partials[1]}
    launch.launch(
        group_norm_partials_kernel, programs, x.device, **how, **arguments, ONE_GROUP=slabs.width == per_group
    )
    launch.launch(
        group_norm_apply_kernel,
        programs,
        x.device,
        **how,
        **arguments,
        **modulation,
        **results,
        CHUNKS=launch.next_power_of_2(slabs.chunks),
        SILU=silu,
    )
    return y, mean, rstd


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    samples, x_channels, pixels, channels_last = sample_shape(x)
    x = x if channels_last else x.contiguous()
    dx, dskip = torch.empty_like(x), x.new_empty(0)
    channels = x_channels
    if skip is not None:
        channels += skip.shape[1]
        skip, dskip = in_layout_of(skip, x), empty_with_channels(x, skip.shape[1])
    grads = [empty_like_or_none(x, parameter) for parameter in (weight, bias, scale, shift, offset)]
    if samples * channels * pixels == 0:
        return dx, *(grad.zero_() for grad in grads[:4]), dskip, grads[4].zero_()
    dy = dy.to(x.dtype)
    dy = dy.movedim(1, -1).contiguous() if channels_last else dy.contiguous()
    per_group = channels // num_groups
    tensors = 2 if skip is None and offset is None else 4
    slabs = launch_choices.choose(samples, num_groups, per_group, pixels, x.itemsize, channels_last, x.device, tensors)
    # What each sample gives to the gradients of weight and bias; those of (N, C) parameters are written as they are.
    of_batch = [
        None if p is None else torch.empty(1, samples, channels, dtype=torch.float32, device=x.device)
        for p in (weight, bias)
    ]
    arguments = _slab_arguments(slabs, x, skip, num_groups)
    arguments |= {"dy": dy, "mean_in": mean.contiguous(), "rstd_in": rstd.contiguous(), "SILU": silu}
    arguments |= per_channel(weight=weight, bias=bias) | per_sample(scale=scale, shift=shift, offset=offset)
    results: dict[str, Any] = {"dx": dx, "dskip": dskip, "of_weight": of_batch[0], "of_bias": of_batch[1]}
    for name, parameter, grad in zip(("dscale", "dshift", "doffset"), (scale, shift, offset), grads[2:], strict=True):
        results[name] = None if parameter is None else grad
    results |= {"values": float(per_group * pixels), "ONE_GROUP": slabs.width == per_group}
    how: dict[str, Any] = {"num_warps": slabs.num_warps, "registers": slabs.registers}
    programs = samples * (channels // slabs.width) * slabs.chunks
    if slabs.resident:
        launch.launch(group_norm_backward_kernel, programs, x.device, **how, **arguments, **results)
    else:
        arguments |= {"chunks": slabs.chunks, "tiles": slabs.tiles}
        for name, wanted in (("sums_dz", True), ("sums_dz_xhat", True), ("sums_xhat", offset is not None)):
            shape = (samples, slabs.chunks, channels)
            arguments[name] = torch.empty(shape, dtype=torch.float32, device=x.device) if wanted else None
        launch.launch(group_norm_backward_partials_kernel, programs, x.device, **how, **arguments)
        results["CHUNKS"] = launch.next_power_of_2(slabs.chunks)
        launch.launch(group_norm_backward_apply_kernel, programs, x.device, **how, **arguments, **results)
    column_sums(*((sums, grad) for sums, grad in zip(of_batch, grads[:2], strict=True) if sums is not None))
    return dx, *grads[:4], dskip, grads[4]


def _slab_arguments(slabs: launch_choices.Slabs, x: Tensor, skip: Tensor | None, num_groups: int) -> dict[str, Any]:
    """What every kernel is told of x, skip and the slabs."""
    _, x_channels, pixels, channels_last = sample_shape(x)
    channels = x_channels if skip is None else x_channels + skip.shape[1]
    return {
        "x": x,
        "skip": skip,
        "pixels": pixels,
        "x_channels": x_channels,
        "channels": channels,
        "slices": channels // slabs.width,
        "PER_GROUP": channels // num_groups,
        "WIDTH": slabs.width,
        "LANES": slabs.lanes,
        "ROWS": slabs.rows,
        "CHANNELS_LAST": channels_last,
        "SKIP": skip is not None,
    }


def group_norm_unsupported(x: Tensor, num_groups: int, *rest: Any) -> str | None:
    skip = rest[6] if len(rest) > 6 else None
    return _unsupported(x, num_groups, skip)


def _unsupported(x: Tensor, num_groups: int, skip: Tensor | None) -> str | None:
    channels = x.shape[1] if skip is None else x.shape[1] + skip.shape[1]
    if channels // num_groups > launch_choices.MOST_LANES:
        return f"a group has more than {launch_choices.MOST_LANES} channels"
    return launch.unsupported(x)


def group_norm_backward_unsupported(dy: Tensor, x: Tensor, *rest: Any) -> str | None:
    skip = rest[8] if len(rest) > 8 else None
    return _unsupported(x, rest[6], skip)
