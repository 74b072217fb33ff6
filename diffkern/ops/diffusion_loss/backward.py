"""The gradient of diffusion_loss: the kernel of diffusion_loss_and_grad with a scale per sample.

With g_n the gradient that arrives, L_n the unweighted loss and m̂ = a·ε + b·x0 the target (derivation:
docs/diffusion_loss.md):

    ∂m = g_n·w_n·(2/D)·(m − m̂)    ∂w_n = g_n·L_n    ∂ε = −a_n·∂m    ∂x0 = −b_n·∂m

and for v, where a = √ᾱ_t and b = −√(1−ᾱ_t), the tables get −Σ <∂m, ε> and Σ <∂m, x0> over the samples at each t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._indices import gather, per_sample, table_gradient
from diffkern.ops._registry import Op
from diffkern.ops.philox_normal.op import OP as PHILOX_NORMAL

MODEL_OUTPUT, X0, _, SIGNAL, SIGMA, WEIGHT, NOISE = range(7)  # positions among the arguments of the registered op


def diffusion_loss_backward(
    loss_and_grad: Op, inputs: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the op's arguments in the schema's order."""
    model_output, x0, t, signal, sigma, weight, noise, seed, draw, samples, stream, target = inputs
    scale = grad.double() if weight is None else grad.double() * weight.double()
    of_target = any(needs[position] for position in (X0, SIGNAL, SIGMA, NOISE))
    output = model_output
    if of_target and output.dtype != torch.float64:
        output = output.float()  # the other gradients are made of this one, so it must not be rounded to 16 bits
    loss, d_output = loss_and_grad(
        output, x0, t, signal, sigma, None, noise, seed, draw, samples, stream, target, scale
    )
    grads: list[Tensor | None] = [None] * len(inputs)
    if needs[MODEL_OUTPUT]:
        grads[MODEL_OUTPUT] = d_output.to(model_output.dtype)
    if weight is not None and needs[WEIGHT]:
        grads[WEIGHT] = (grad * loss).to(weight.dtype)
    if not of_target:
        return tuple(grads)

    def times(table: Tensor) -> Tensor:
        """table[t]·∂m for v; the other targets are ε or x0 itself."""
        return per_sample(gather(table, t).to(d_output.dtype), d_output) * d_output

    if noise is not None and needs[NOISE]:
        grads[NOISE] = (-times(signal) if target == "v" else -d_output).to(noise.dtype)
    if x0 is not None and needs[X0]:
        grads[X0] = (times(sigma) if target == "v" else -d_output).to(x0.dtype)
    if target == "v" and needs[SIGMA]:
        grads[SIGMA] = table_gradient(sigma, t, d_output, x0)
    if target == "v" and needs[SIGNAL]:
        if noise is None:
            noise = PHILOX_NORMAL(list(output.shape), seed, draw, samples, stream, output.dtype, False)
        grads[SIGNAL] = table_gradient(signal, t, -d_output, noise)
    return tuple(grads)
