"""The backward pass of channel_rms_norm, an op of its own."""

from __future__ import annotations

from torch import Tensor

from diffkern.ops._affine import empty_like_or_none, statistics_dtype
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._registry import Op


def channel_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: Tensor,
    silu: bool,
) -> tuple[Tensor | None, ...]:
    """dx and the gradients of weight, scale and shift, None for an absent parameter (docs/channel_rms_norm.md)."""
    _check_saved(dy, x, norm)
    grads = BACKWARD(dy, x, weight, eps, scale, shift, norm, silu)
    return grads[0], *(None if p is None else grad for p, grad in zip((weight, scale, shift), grads[1:], strict=True))


def _check_saved(dy: Tensor, x: Tensor, norm: Tensor) -> None:
    """What was saved may have become anything through x.data or hooks on saved tensors, and is read by address."""
    if x.shape != dy.shape:
        raise RuntimeError(
            f"channel_rms_norm: x had shape {tuple(dy.shape)} in the forward pass, "
            f"and has {tuple(x.shape)} in the backward pass"
        )
    wanted = (x.shape[0], 1, *x.shape[2:])
    if norm.shape != wanted or norm.dtype != statistics_dtype(x):
        raise RuntimeError(
            f"channel_rms_norm: the saved norms came back as {norm.dtype} {tuple(norm.shape)}, "
            f"not {statistics_dtype(x)} {wanted}"
        )


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: Tensor,
    silu: bool,
) -> tuple[Tensor, ...]:
    return (empty_like_layout(x), *(empty_like_or_none(x, p) for p in (weight, scale, shift)))


BACKWARD = Op(
    "channel_rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, Tensor? scale, Tensor? shift, "
    "Tensor norm, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    fake=_fake_backward,
)
