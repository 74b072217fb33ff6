"""group_norm through csrc/cpu/group_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._native import (
    DTYPE_CODES,
    about_to_write,
    cpu_only,
    gradient_room,
    num_threads,
    parameter_tuple,
    sample_shape,
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
    samples, channels, pixels, channels_last = shape = sample_shape(x)
    if not channels_last:
        x = x.contiguous()
    y = about_to_write(torch.empty_like(x))
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
        parameter_tuple(weight),
        parameter_tuple(bias),
        parameter_tuple(scale),
        parameter_tuple(shift),
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
    dx = about_to_write(torch.empty_like(x))
    grads = [gradient_room(weight, x), gradient_room(bias, x), gradient_room(scale, x), gradient_room(shift, x)]
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
            parameter_tuple(weight),
            parameter_tuple(bias),
            parameter_tuple(scale),
            parameter_tuple(shift),
            silu,
            mean.data_ptr(),
            rstd.data_ptr(),
            dy.data_ptr(),
            dx.data_ptr(),
            sums.data_ptr(),
            None if weight is None else grads[0].data_ptr(),
            None if bias is None else grads[1].data_ptr(),
            None if scale is None else grads[2].data_ptr(),
            None if shift is None else grads[3].data_ptr(),
            num_threads(samples * channels * pixels),
        )
    for i, parameter in enumerate((weight, bias, scale, shift)):
        if parameter is not None and parameter.dtype != torch.float32:
            grads[i] = grads[i].to(parameter.dtype)
    return dx, grads[0], grads[1], grads[2], grads[3], x.new_empty(0), x.new_empty(0)


def group_norm_unsupported(x: Tensor, *rest: object) -> str | None:
    return _unsupported(x, rest[7:])


def group_norm_backward_unsupported(dy: Tensor, x: Tensor, *rest: object) -> str | None:
    return _unsupported(x, rest[8:])


def _unsupported(x: Tensor, skip_and_offset: tuple[object, ...]) -> str | None:
    if any(operand is not None for operand in skip_and_offset):
        return "skip and offset are the reference's"
    if x.dtype == torch.float64:
        return "float64 statistics are the reference's"
    return cpu_only(x)
