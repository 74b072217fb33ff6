"""The backward pass of group_norm, an op of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._affine import empty_like_or_none, statistics_dtype
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._registry import Op


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
) -> tuple[Tensor | None, ...]:
    """dx and the gradients of weight, bias, scale and shift, None for an absent parameter (docs/group_norm.md)."""
    _check_saved(dy, x, mean, rstd, num_groups)
    grads = BACKWARD(dy, x, weight, bias, scale, shift, mean, rstd, num_groups, silu)
    return grads[0], *(
        None if p is None else grad for p, grad in zip((weight, bias, scale, shift), grads[1:], strict=True)
    )


def _check_saved(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, num_groups: int) -> None:
    """What was saved may have become anything through x.data or hooks on saved tensors, and is read by address."""
    if x.shape != dy.shape:
        raise RuntimeError(
            f"group_norm: x had shape {tuple(dy.shape)} in the forward pass, "
            f"and has {tuple(x.shape)} in the backward pass"
        )
    for saved in (mean, rstd):
        if saved.shape != (x.shape[0], num_groups) or saved.dtype != statistics_dtype(x):
            raise RuntimeError(
                f"group_norm: the saved statistics came back as {saved.dtype} {tuple(saved.shape)}, "
                f"not {statistics_dtype(x)} {(x.shape[0], num_groups)}"
            )


def _fake_backward(
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
) -> tuple[Tensor, ...]:
    return (empty_like_layout(x), *(empty_like_or_none(x, p) for p in (weight, bias, scale, shift)))


BACKWARD = Op(
    "group_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor mean, "
    "Tensor rstd, int num_groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    fake=_fake_backward,
)
