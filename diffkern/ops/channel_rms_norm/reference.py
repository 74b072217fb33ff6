"""channel_rms_norm and its backward pass as the formulas read (docs/channel_rms_norm.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._affine import as_samples, empty_like_or_none, over_pixels, statistics_dtype
from diffkern.ops._layout import dense, in_layout_of


def channel_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    # The squares in float64: theirs is twice the range of float32's exponents.
    norm = x.double().square().sum(1, keepdim=True).sqrt().to(statistics_dtype(x)).contiguous()
    z, _, _, _ = _affine(x, weight, eps, scale, shift, norm)
    y = z * torch.sigmoid(z) if silu else z
    return in_layout_of(y.to(x.dtype), dense(x)), norm


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
    """dx and the gradients of weight, scale and shift (empty where there is no such parameter)."""
    z, u, gamma, one_plus_scale = _affine(x, weight, eps, scale, shift, norm)
    s = torch.sigmoid(z)
    dz = dy.to(z.dtype) * (s + s * z * (1 - s)) if silu else dy.to(z.dtype)
    du = dz * over_pixels(gamma, x)
    along = torch.where(norm < eps, 0.0, (du * u).sum(1, keepdim=True))
    dx = (du - u * along) / norm.clamp_min(eps)

    sum_dz = dz.flatten(2).sum(2) if x.dim() > 2 else dz
    sum_dz_u = (dz * u).flatten(2).sum(2) if x.dim() > 2 else dz * u
    sum_dz_xhat = x.shape[1] ** 0.5 * sum_dz_u
    gradients = [(one_plus_scale * sum_dz_xhat).sum(0), as_samples(weight, 1.0, x) * sum_dz_xhat, sum_dz]
    cast = [
        empty_like_or_none(x, None) if p is None else g.to(p.dtype).contiguous()
        for p, g in zip((weight, scale, shift), gradients, strict=True)
    ]
    # The last may be the very tensor dz (rank 2), or dy: outputs share no memory.
    cast[2] = cast[2].clone() if shift is not None else cast[2]
    return in_layout_of(dx.to(x.dtype), dense(x)), cast[0], cast[1], cast[2]


def _affine(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z and u = x/max(norm, eps) of x's shape, √C·weight·(1 + scale) and 1 + scale of shape (N or 1, C)."""
    u = x.to(statistics_dtype(x)) / norm.clamp_min(eps)
    one_plus_scale = 1.0 + as_samples(scale, 0.0, x)
    gamma = x.shape[1] ** 0.5 * as_samples(weight, 1.0, x) * one_plus_scale
    return u * over_pixels(gamma, x) + over_pixels(as_samples(shift, 0.0, x), x), u, gamma, one_plus_scale


def channel_rms_norm_unsupported(*args: object) -> None:
    return None


def channel_rms_norm_backward_unsupported(*args: object) -> None:
    return None
