"""group_norm's short road: plain CPU tensors in eager mode, one native call from tensor to tensor.

A call on a small tensor costs what happens around the kernel. Here the native module reads the tensors itself (through
DLPack), so that nothing is left to do in Python; whatever is not plain, wrong arguments included, is not taken, and
op.py goes the general road.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled

from diffkern import backends
from diffkern.ops import _registry
from diffkern.ops.group_norm.backward import group_norm_backward


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    silu: bool,
) -> Tensor | None:
    """y of op.group_norm, or None where the call is not plain."""
    if not _registry.in_plain_eager_mode():
        return None
    native = backends.eager_native()
    if native is None:
        return None
    result = native.group_norm_eager(
        x, num_groups, weight, bias, eps, scale, shift, offset, silu, is_grad_enabled(), get_num_threads()
    )
    if type(result) is not tuple:
        return result
    return _apply((*result, num_groups, silu), x, weight, bias, scale, shift, offset)


class _GroupNorm(torch.autograd.Function):
    """Hangs a result that is there already into autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        result: tuple[Tensor, Tensor, int, bool],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        y, statistics, ctx.num_groups, ctx.silu = result
        ctx.save_for_backward(x, weight, bias, scale, shift, offset, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, offset, statistics = ctx.saved_tensors
        native = backends.eager_native()
        grads = None
        if native is not None and _registry.in_plain_eager_mode() and not is_grad_enabled():
            wanted = ctx.needs_input_grad[2:]
            grads = native.group_norm_backward_eager(
                dy,
                x,
                weight,
                bias,
                scale,
                shift,
                offset,
                statistics,
                ctx.num_groups,
                ctx.silu,
                wanted,
                get_num_threads(),
            )
        if grads is None:
            mean, rstd = statistics.unbind(0)
            *grads, _, doffset = group_norm_backward(
                dy, x, weight, bias, scale, shift, mean, rstd, ctx.num_groups, ctx.silu, None, offset
            )
            grads.append(doffset)
        return None, *grads


# Function.apply but for its care of torch.func, which is not active here: a fifth of what a small call costs.
_apply = super(torch.autograd.Function, _GroupNorm).apply
