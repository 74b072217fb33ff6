"""channel_rms_norm through csrc/cpu/channel_rms_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import sample_shape
from diffkern.ops._native import DTYPE_CODES, cpu_only, gradient_room, num_threads, output_like, parameter_tuple


def channel_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    shape = sample_shape(x)
    if not shape[3]:
        x = x.contiguous()
    y = output_like(x)
    norm = torch.empty((x.shape[0], 1, *x.shape[2:]), dtype=torch.float32)
    if x.numel() == 0:
        return y, norm.zero_()
    # By position, in the binding's order: names would cost a small call a tenth of its time.
    native_module().channel_rms_norm(
        shape,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        parameter_tuple(weight),
        parameter_tuple(scale),
        parameter_tuple(shift),
        eps,
        silu,
        y.data_ptr(),
        norm.data_ptr(),
        num_threads(x.numel()),
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
    shape = sample_shape(x)
    if dy.dtype != x.dtype:
        dy = dy.to(x.dtype)
    if shape[3]:
        dy = dy.movedim(1, -1).contiguous()
    else:
        x, dy = x.contiguous(), dy.contiguous()
    dx, norm = output_like(x), norm.contiguous()
    parameters = (weight, scale, shift)
    grads = [gradient_room(p, x) for p in parameters]
    if x.numel() == 0:
        grads = [gradient.zero_() for gradient in grads]
    else:
        native_module().channel_rms_norm_backward(
            shape,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            parameter_tuple(weight),
            parameter_tuple(scale),
            parameter_tuple(shift),
            eps,
            silu,
            norm.data_ptr(),
            dy.data_ptr(),
            dx.data_ptr(),
            *(None if p is None else g.data_ptr() for p, g in zip(parameters, grads, strict=True)),
            num_threads(x.numel()),
        )
    for i, parameter in enumerate(parameters):
        if parameter is not None and parameter.dtype != torch.float32:
            grads[i] = grads[i].to(parameter.dtype)
    return dx, grads[0], grads[1], grads[2]


def channel_rms_norm_unsupported(x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def channel_rms_norm_backward_unsupported(dy: Tensor, x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def _unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "float64 arithmetic is the reference's"
    return cpu_only(x)
