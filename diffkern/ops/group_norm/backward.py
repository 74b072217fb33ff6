"""The backward pass of group_norm, an op of its own."""

from __future__ import annotations

from torch import Tensor

from diffkern.ops._affine import empty_like_or_none, statistics_dtype
from diffkern.ops._layout import empty_like_layout, empty_with_channels
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
    skip: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, scale, shift, skip and offset, None for what is absent (docs/group_norm.md)."""
    _check_saved(dy, x, skip, mean, rstd, num_groups)
    grads = BACKWARD(dy, x, weight, bias, scale, shift, mean, rstd, num_groups, silu, skip, offset)
    operands = (x, weight, bias, scale, shift, skip, offset)
    return tuple(None if operand is None else grad for operand, grad in zip(operands, grads, strict=True))


def _check_saved(dy: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int) -> None:
    """What was saved may have become anything through x.data or hooks on saved tensors, and is read by address."""
    expected, names = tuple(dy.shape), "x"
    if skip is not None:
        expected, names = (dy.shape[0], dy.shape[1] - skip.shape[1], *dy.shape[2:]), "x beside skip"
    if tuple(x.shape) != expected:
        raise RuntimeError(
            f"group_norm: {names} had shape {expected} in the forward pass, "
            f"and has {tuple(x.shape)} in the backward pass"
        )
    if skip is not None and (skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]):
        raise RuntimeError(f"group_norm: skip came back as {tuple(skip.shape)}, beside x of {tuple(x.shape)}")
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
    skip: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    dskip = x.new_empty(0) if skip is None else empty_with_channels(x, skip.shape[1])
    parameters = [empty_like_or_none(x, p) for p in (weight, bias, scale, shift)]
    return (empty_like_layout(x), *parameters, dskip, empty_like_or_none(x, offset))


BACKWARD = Op(
    "group_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor mean, "
    "Tensor rstd, int num_groups, bool silu, Tensor? skip=None, Tensor? offset=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    fake=_fake_backward,
)
