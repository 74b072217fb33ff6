"""The backward passes of attention, ops of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffkern.ops._registry import Op
from diffkern.ops.attention.views import accumulated_in, out_like


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v (docs/attention.md)."""
    length = 1 if channels_last else 2
    _check_saved("q", q, dout.shape)
    _check_saved("k", k, v.shape)
    if v.shape[0] != dout.shape[0] or v.shape[3 - length] != dout.shape[3 - length]:
        raise RuntimeError(f"attention: v came back as {tuple(v.shape)} in the backward pass, beside {tuple(q.shape)}")
    _check_rows(dout, out, lse, (2, q.shape[0], num_heads, q.shape[length]))
    return BACKWARD(dout.to(q.dtype), q, k, v, out, lse, num_heads, scale, channels_last)


def attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str, scale: float, channels_last: bool
) -> Tensor:
    """The gradient of qkv (docs/attention.md)."""
    length = 1 if channels_last else 2
    packed = list(dout.shape)
    packed[3 - length] *= 3
    _check_saved("qkv", qkv, packed)
    _check_rows(dout, out, lse, (2, qkv.shape[0], num_heads, qkv.shape[length]))
    return QKV_BACKWARD(dout.to(qkv.dtype), qkv, out, lse, num_heads, order, scale, channels_last)


def _check_saved(name: str, saved: Tensor, shape: Sequence[int]) -> None:
    """What was saved may have become anything through .data or hooks on saved tensors, and is read by address."""
    expected = tuple(shape)
    if tuple(saved.shape) != expected:
        raise RuntimeError(
            f"attention: {name} had shape {expected} in the forward pass, "
            f"and has {tuple(saved.shape)} in the backward pass"
        )


def _check_rows(dout: Tensor, out: Tensor, lse: Tensor, rows: tuple[int, ...]) -> None:
    _check_saved("the result", out, dout.shape)
    if tuple(lse.shape) == (0,) != rows:
        raise RuntimeError("attention: the forward pass was told that nobody would want a gradient (with_lse=False)")
    if tuple(lse.shape) != rows or lse.dtype != accumulated_in(out):
        raise RuntimeError(
            f"attention: the rows' sums came back as {lse.dtype} {tuple(lse.shape)}, not {accumulated_in(out)} {rows}"
        )


def _fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    return tuple(out_like(x, x.shape[2 if channels_last else 1], channels_last) for x in (q, k, v))


def _qkv_fake(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str, scale: float, channels_last: bool
) -> Tensor:
    return out_like(qkv, qkv.shape[2 if channels_last else 1], channels_last)


BACKWARD = Op(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int num_heads, "
    "float scale, bool channels_last) -> (Tensor, Tensor, Tensor)",
    package=__package__,
    fake=_fake,
)
QKV_BACKWARD = Op(
    "attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, str order, float scale, "
    "bool channels_last) -> Tensor",
    package=__package__,
    fake=_qkv_fake,
)
