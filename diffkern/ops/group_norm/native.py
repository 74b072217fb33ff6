"""group_norm through csrc/cpu/group_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._native import DTYPE_CODES, cpu_only, num_threads, sample_shape
from diffkern.ops.group_norm.op import empty_like_or_none

ParameterTuple = tuple[int, int, int, int]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = sample_shape(x)
    if not shape[3]:
        x = x.contiguous()
    y = empty_like_layout(x)
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    native_module().group_norm(
        shape=shape,
        num_groups=num_groups,
        dtype=DTYPE_CODES[x.dtype],
        x=x.data_ptr(),
        weight=_parameter(weight),
        bias=_parameter(bias),
        scale=_parameter(scale),
        shift=_parameter(shift),
        eps=eps,
        silu=silu,
        y=y.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        num_threads=num_threads(x.numel()),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = sample_shape(x)
    channels_last = shape[3]
    if not channels_last:
        x = x.contiguous()
    dy = dy.to(x.dtype)
    dy = dy.movedim(1, -1).contiguous() if channels_last else dy.contiguous()
    dx = empty_like_layout(x)
    parameters = (weight, bias, scale, shift)
    if x.numel() == 0:
        grads = [empty_like_or_none(x, p).zero_() for p in parameters]
        return dx, grads[0], grads[1], grads[2], grads[3]
    grads = [x.new_empty(0) if p is None else torch.empty(p.shape, dtype=torch.float32) for p in parameters]
    sums = torch.empty((2, *x.shape[:2]), dtype=torch.float32)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    native_module().group_norm_backward(
        shape=shape,
        num_groups=num_groups,
        dtype=DTYPE_CODES[x.dtype],
        x=x.data_ptr(),
        weight=_parameter(weight),
        bias=_parameter(bias),
        scale=_parameter(scale),
        shift=_parameter(shift),
        silu=silu,
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        dy=dy.data_ptr(),
        dx=dx.data_ptr(),
        sums=sums.data_ptr(),
        dweight=None if weight is None else grads[0].data_ptr(),
        dbias=None if bias is None else grads[1].data_ptr(),
        dscale=None if scale is None else grads[2].data_ptr(),
        dshift=None if shift is None else grads[3].data_ptr(),
        num_threads=num_threads(x.numel()),
    )
    cast = [g if p is None else g.to(p.dtype) for p, g in zip(parameters, grads, strict=True)]
    return dx, cast[0], cast[1], cast[2], cast[3]


def _parameter(p: Tensor | None) -> ParameterTuple | None:
    """The bindings' `param`: (C,) has no stride between samples, (N, C) has both, whatever they are."""
    if p is None:
        return None
    if p.dim() == 1:
        return p.data_ptr(), DTYPE_CODES[p.dtype], 0, p.stride(0)
    return p.data_ptr(), DTYPE_CODES[p.dtype], p.stride(0), p.stride(1)


def group_norm_unsupported(x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def group_norm_backward_unsupported(dy: Tensor, x: Tensor, *rest: object) -> str | None:
    return _unsupported(x)


def _unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "float64 statistics are the reference's"
    return cpu_only(x)
