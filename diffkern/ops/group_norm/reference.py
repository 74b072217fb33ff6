"""group_norm and its backward pass as the formulas read (docs/group_norm.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._affine import as_samples, over_pixels, statistics_dtype
from diffkern.ops._layout import dense, in_layout_of


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
    like, dtype, x = dense(x), x.dtype, _joined(x, skip, offset)
    if x.numel() == 0:
        statistics = x.new_zeros((x.shape[0], num_groups))
        return in_layout_of(x.to(dtype, copy=True), like), statistics, statistics.clone()
    grouped = _grouped(x, num_groups)
    mean = grouped.mean(2)
    mean = mean + (grouped - mean.unsqueeze(2)).mean(2)  # what rounding the sum left: a constant group is then exact
    rstd = torch.rsqrt((grouped - mean.unsqueeze(2)).square().mean(2) + eps)
    z, _, _, _ = _affine(x, weight, bias, scale, shift, mean, rstd, num_groups)
    y = z * torch.sigmoid(z) if silu else z
    return in_layout_of(y.to(dtype), like), mean, rstd


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
    """The gradients of x, weight, bias, scale, shift, skip and offset (empty where there is no such operand)."""
    like, dtype, x = dense(x), x.dtype, _joined(x, skip, offset)
    z, xhat, gamma, one_plus_scale = _affine(x, weight, bias, scale, shift, mean, rstd, num_groups)
    s = torch.sigmoid(z)
    dz = dy.to(x.dtype) * (s + s * z * (1 - s)) if silu else dy.to(x.dtype)
    sum_dz, sum_dz_xhat = _over_pixels(dz), _over_pixels(dz * xhat)

    if x.numel():
        d_xhat = _grouped(dz * over_pixels(gamma, x), num_groups)
        xhat_grouped = _grouped(xhat, num_groups)
        projection = d_xhat.mean(2, keepdim=True) + xhat_grouped * (d_xhat * xhat_grouped).mean(2, keepdim=True)
        dx = ((d_xhat - projection) * rstd.unsqueeze(2)).reshape(x.shape)
    else:
        dx = torch.zeros_like(x)
    plain_weight, plain_bias = as_samples(weight, 1.0, x), as_samples(bias, 0.0, x)
    gradients = [
        (one_plus_scale * sum_dz_xhat).sum(0),
        (one_plus_scale * sum_dz).sum(0),
        plain_weight * sum_dz_xhat + plain_bias * sum_dz,
        sum_dz,
        _over_pixels(dx),
    ]
    # Outputs must not share memory, and in rank 2 a sum over the pixels is the very tensor: hence the copies.
    of_parameters = [
        like.new_empty(0) if p is None else g.to(p.dtype, copy=True).contiguous()
        for p, g in zip((weight, bias, scale, shift, offset), gradients, strict=True)
    ]
    dx = dx.to(dtype, copy=True)
    if skip is None:
        of_inputs = [dx, like.new_empty(0)]
    else:
        of_inputs = [part.clone() for part in dx.split([like.shape[1], skip.shape[1]], 1)]
        of_inputs[1] = in_layout_of(of_inputs[1], like)
    return in_layout_of(of_inputs[0], like), *of_parameters[:4], of_inputs[1], of_parameters[4]


def _joined(x: Tensor, skip: Tensor | None, offset: Tensor | None) -> Tensor:
    """cat([x, skip], 1) + offset in the arithmetic's dtype."""
    compute = statistics_dtype(x)
    x = x.to(compute)
    if skip is not None:
        x = torch.cat([x, skip.to(compute)], 1)  # cast first: under autocast on a CPU torch.cat refuses float16
    return x if offset is None else x + over_pixels(offset.to(compute), x)


def _over_pixels(x: Tensor) -> Tensor:
    """(N, C, …) summed to (N, C)."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def _affine(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, x̂ of x's shape and γ' = γ·(1 + scale), 1 + scale of shape (N or 1, C)."""
    grouped = _grouped(x, num_groups)
    xhat = ((grouped - mean.unsqueeze(2)) * rstd.unsqueeze(2)).reshape(x.shape)
    one_plus_scale = 1.0 + as_samples(scale, 0.0, x)
    gamma = as_samples(weight, 1.0, x) * one_plus_scale
    beta = as_samples(bias, 0.0, x) * one_plus_scale + as_samples(shift, 0.0, x)
    return xhat * over_pixels(gamma, x) + over_pixels(beta, x), xhat, gamma, one_plus_scale


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """(N, C, …) as (N, G, values of a group)."""
    return x.reshape(x.shape[0], num_groups, x[0:1].numel() // num_groups)


def group_norm_unsupported(*args: object) -> None:
    return None


def group_norm_backward_unsupported(*args: object) -> None:
    return None
