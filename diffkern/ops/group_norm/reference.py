"""group_norm and its backward pass as the formulas read (docs/group_norm.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._affine import as_samples, empty_like_or_none, over_pixels, statistics_dtype
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
) -> tuple[Tensor, Tensor, Tensor]:
    compute = statistics_dtype(x)
    if x.numel() == 0:
        statistics = x.new_zeros((x.shape[0], num_groups), dtype=compute)
        return torch.empty_like(dense(x)), statistics, statistics.clone()
    grouped = _grouped(x.to(compute), num_groups)
    mean = grouped.mean(2)
    mean = mean + (grouped - mean.unsqueeze(2)).mean(2)  # what rounding the sum left: a constant group is then exact
    rstd = torch.rsqrt((grouped - mean.unsqueeze(2)).square().mean(2) + eps)
    z, _, _, _ = _affine(x, weight, bias, scale, shift, mean, rstd, num_groups)
    y = z * torch.sigmoid(z) if silu else z
    return in_layout_of(y.to(x.dtype), dense(x)), mean, rstd


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
    """dx and the gradients of weight, bias, scale and shift (empty where there is no such parameter)."""
    compute = statistics_dtype(x)
    z, xhat, gamma, one_plus_scale = _affine(x, weight, bias, scale, shift, mean, rstd, num_groups)
    s = torch.sigmoid(z)
    dz = dy.to(compute) * (s + s * z * (1 - s)) if silu else dy.to(compute)
    sum_dz = dz.flatten(2).sum(2) if x.dim() > 2 else dz
    sum_dz_xhat = (dz * xhat).flatten(2).sum(2) if x.dim() > 2 else dz * xhat

    if x.numel():
        d_xhat = _grouped(dz * over_pixels(gamma, x), num_groups)
        xhat_grouped = _grouped(xhat, num_groups)
        projection = d_xhat.mean(2, keepdim=True) + xhat_grouped * (d_xhat * xhat_grouped).mean(2, keepdim=True)
        dx = ((d_xhat - projection) * rstd.unsqueeze(2)).reshape(x.shape)
    else:
        dx = torch.zeros_like(x, dtype=compute)
    plain_weight, plain_bias = as_samples(weight, 1.0, x), as_samples(bias, 0.0, x)
    gradients = [
        (one_plus_scale * sum_dz_xhat).sum(0),
        (one_plus_scale * sum_dz).sum(0),
        plain_weight * sum_dz_xhat + plain_bias * sum_dz,
        sum_dz,
    ]
    parameters = (weight, bias, scale, shift)
    cast = [
        empty_like_or_none(x, None) if p is None else g.to(p.dtype).contiguous()
        for p, g in zip(parameters, gradients, strict=True)
    ]
    # A gradient may be the very tensor dz (rank 2): outputs must not share memory.
    cast[3] = cast[3].clone() if shift is not None else cast[3]
    return in_layout_of(dx.to(x.dtype), dense(x)), cast[0], cast[1], cast[2], cast[3]


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
    compute = statistics_dtype(x)
    grouped = _grouped(x.to(compute), num_groups)
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
