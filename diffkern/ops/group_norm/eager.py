"""group_norm's short road: plain CPU tensors in eager mode, one native call from tensor to tensor.

A call on a small tensor costs what happens around the kernel. Here the native module reads the tensors itself (through
DLPack), so that nothing is left to do in Python; whatever is not plain, wrong arguments included, is not taken, and
op.py goes the general road.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    silu: bool,
) -> Tensor | None:
    """y of op.group_norm, or None where the call is not plain."""
    if not _registry.in_plain_eager_mode():
        return None
    native = backends.eager_native()
    if native is None:
        return None
    result = native.group_norm_eager(
        x, num_groups, weight, bias, eps, scale, shift, silu, torch.is_grad_enabled(), torch.get_num_threads()
    )
    if type(result) is not tuple:
        return result
    return _GroupNorm.apply(x, weight, bias, scale, shift, result, num_groups, silu)


class _GroupNorm(torch.autograd.Function):
    """Hangs a result that is there already into autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        result: tuple[Tensor, Tensor],
        num_groups: int,
        silu: bool,
    ) -> Tensor:
        y, statistics = result
        ctx.save_for_backward(x, weight, bias, scale, shift, statistics)
        ctx.num_groups, ctx.silu = num_groups, silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, statistics = ctx.saved_tensors
        native = backends.eager_native()
        grads = None
        if native is not None and _registry.in_plain_eager_mode() and not torch.is_grad_enabled():
            grads = native.group_norm_backward_eager(
                dy,
                x,
                weight,
                bias,
                scale,
                shift,
                statistics,
                ctx.num_groups,
                ctx.silu,
                ctx.needs_input_grad[1:5],
                torch.get_num_threads(),
            )
        if grads is None:
            mean, rstd = statistics.unbind(0)
            grads = group_norm_backward(dy, x, weight, bias, scale, shift, mean, rstd, ctx.num_groups, ctx.silu)
        return (*grads, None, None, None)
