"""group_norm through csrc/cpu/group_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import empty_with_channels, in_layout_of, sample_shape
from diffkern.ops._native import DTYPE_CODES, about_to_write, cpu_only, gradient_room, num_threads, parameter_tuple


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
    samples, channels, pixels, channels_last = shape = sample_shape(x)
    if not channels_last:
        x = x.contiguous()
    if skip is None:
        y = torch.empty_like(x)
    else:
        channels += skip.shape[1]
        shape, skip = (samples, channels, pixels, channels_last), _in_layout_of(skip, x)
        y = empty_with_channels(x, channels)
    about_to_write(y)
    mean = torch.empty(samples, num_groups, dtype=torch.float32)
    rstd = torch.empty(samples, num_groups, dtype=torch.float32)
    if samples * channels * pixels == 0:
        return y, mean.zero_(), rstd.zero_()
    # By position, in the binding's order: names would cost a small call a tenth of its time.
    native_module().group_norm(
        shape,
        num_groups,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        None if skip is None else skip.data_ptr(),
        x.shape[1],
        parameter_tuple(weight),
        parameter_tuple(bias),
        parameter_tuple(scale),
        parameter_tuple(shift),
        parameter_tuple(offset),
        eps,
        silu,
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        num_threads(samples * channels * pixels),
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
    samples, channels, pixels, channels_last = shape = sample_shape(x)
    if dy.dtype != x.dtype:
        dy = dy.to(x.dtype)
    if channels_last:
        dy = dy.movedim(1, -1).contiguous()
    else:
        x, dy = x.contiguous(), dy.contiguous()
    dx, dskip = about_to_write(torch.empty_like(x)), x.new_empty(0)
    if skip is not None:
        channels += skip.shape[1]
        shape, skip = (samples, channels, pixels, channels_last), _in_layout_of(skip, x)
        dskip = about_to_write(empty_with_channels(x, skip.shape[1]))
    parameters = (weight, bias, scale, shift, offset)
    grads = [gradient_room(p, x) for p in parameters]
    if samples * channels * pixels == 0:
        grads = [gradient.zero_() for gradient in grads]
    else:
        sums = torch.empty(2 * samples * channels, dtype=torch.float32)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        native_module().group_norm_backward(
            shape,
            num_groups,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            None if skip is None else skip.data_ptr(),
            x.shape[1],
            *(parameter_tuple(p) for p in parameters),
            silu,
            mean.data_ptr(),
            rstd.data_ptr(),
            dy.data_ptr(),
            dx.data_ptr(),
            dskip.data_ptr(),
            sums.data_ptr(),
            *(None if p is None else grad.data_ptr() for p, grad in zip(parameters, grads, strict=True)),
            num_threads(samples * channels * pixels),
        )
    for i, parameter in enumerate(parameters):
        if parameter is not None and parameter.dtype != torch.float32:
            grads[i] = grads[i].to(parameter.dtype)
    return dx, *grads[:4], dskip, grads[4]


def _in_layout_of(skip: Tensor, x: Tensor) -> Tensor:
    if skip.data_ptr() == 0 and skip.numel():
        raise RuntimeError(f"skip of shape {tuple(skip.shape)} has no memory: its storage was freed")
    return in_layout_of(skip, x)


def group_norm_unsupported(x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def group_norm_backward_unsupported(dy: Tensor, x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def _unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "float64 statistics are the reference's"
    return cpu_only(x)
