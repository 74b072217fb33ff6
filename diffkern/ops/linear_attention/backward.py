"""The backward pass of linear_attention, an op of its own."""

from __future__ import annotations

from torch import Tensor

from diffkern.ops._affine import empty_like_or_none
from diffkern.ops._registry import Op
from diffkern.ops.attention.views import accumulated_in, out_like


def linear_attention_backward(
    dout: Tensor,
    qkv: Tensor,
    memory: Tensor | None,
    context: Tensor,
    k_max: Tensor,
    k_sum: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of qkv and, where there is one, of memory (docs/linear_attention.md)."""
    _check_saved(dout, qkv, memory, (context, k_max, k_sum), num_heads, channels_last)
    dqkv, dmemory = BACKWARD(dout.to(qkv.dtype), qkv, memory, context, k_max, k_sum, num_heads, scale, channels_last)
    return dqkv, None if memory is None else dmemory


def _check_saved(
    dout: Tensor,
    qkv: Tensor,
    memory: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    num_heads: int,
    channels_last: bool,
) -> None:
    """What was saved may have become anything through .data or hooks on saved tensors, and is read by address."""
    axis = 2 if channels_last else 1
    packed = list(dout.shape)
    packed[axis] *= 3
    if list(qkv.shape) != packed:
        raise RuntimeError(
            f"linear_attention: qkv had shape {tuple(packed)} in the forward pass, "
            f"and has {tuple(qkv.shape)} in the backward pass"
        )
    d = dout.shape[axis] // num_heads
    if memory is not None and (memory.dim() != 4 or tuple(memory.shape[:3]) != (2, num_heads, d)):
        raise RuntimeError(f"linear_attention: memory came back as {tuple(memory.shape)} in the backward pass")
    each = (qkv.shape[0], num_heads, d)
    for name, x, shape in zip(("context", "maxima", "sums"), saved, ((*each, d), each, each), strict=True):
        if tuple(x.shape) != shape or x.dtype != accumulated_in(qkv):
            raise RuntimeError(
                f"linear_attention: the {name} came back as {x.dtype} {tuple(x.shape)}, "
                f"not {accumulated_in(qkv)} {shape}"
            )


def _fake(
    dout: Tensor,
    qkv: Tensor,
    memory: Tensor | None,
    context: Tensor,
    k_max: Tensor,
    k_sum: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    return out_like(qkv, qkv.shape[2 if channels_last else 1], channels_last), empty_like_or_none(qkv, memory)


BACKWARD = Op(
    "linear_attention_backward(Tensor dout, Tensor qkv, Tensor? memory, Tensor context, Tensor k_max, Tensor k_sum, "
    "int num_heads, float scale, bool channels_last) -> (Tensor, Tensor)",
    package=__package__,
    fake=_fake,
)
