"""The gradient of vb_terms: by model_output the kernel of vb_terms_and_grad, by everything else plain PyTorch.

Without a clip every term is a function of the residual m − (of_y·y + of_x0·x0), of the variance's channels and of the
timestep's numbers, so that with G the gradient by the mean's channels (docs/vb_terms.md):

    ∂y = −of_y·G    ∂x0 = −of_x0·G    ∂of_y = −<G, y>    ∂of_x0 = −<G, x0>

and the other numbers have sums of the same kind. Where x̂0 was clipped, x0 − x̂0 is a function of x0 instead. A term
whose gradient is stopped at the mean is stopped here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._indices import gather, per_sample
from diffkern.ops._layout import flat_samples
from diffkern.ops._registry import Op

MODEL_OUTPUT, X0, _, COEFFICIENTS, NOISE = range(5)  # positions among the arguments of the registered op


def vb_terms_backward(
    and_grad: Op, inputs: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the op's arguments in the schema's order; `grad` (N, 3)."""
    scale = grad.double()
    grads: list[Tensor | None] = [None] * len(inputs)
    if needs[MODEL_OUTPUT]:
        grads[MODEL_OUTPUT] = and_grad(*inputs, scale)[1]
    if needs[X0] or needs[COEFFICIENTS] or needs[NOISE]:
        _other_gradients(inputs, scale, needs, grads)
    return tuple(grads)


def _other_gradients(inputs: Sequence[Any], scale: Tensor, needs: Sequence[bool], grads: list[Tensor | None]) -> None:
    # Only here, where it is the formulas that are wanted and not a backend.
    from diffkern.ops.vb_terms.reference import Arguments, elements, of_mean, per_element_scales

    args = Arguments(*inputs)
    found = elements(args)
    of_m = of_mean(args, found, scale)
    table = gather(args.coefficients, args.t)
    x0_scale, coef1 = table[:, 2], table[:, 3]
    _, of_vb, of_x0 = per_element_scales(scale, found.residual)
    of_bound = torch.zeros_like(of_vb) if args.stops_mean else of_vb
    clipped = ~found.inside

    def on(values: Tensor) -> Tensor:
        return per_sample(values.to(of_m.dtype), of_m)

    if needs[NOISE]:
        grads[NOISE] = (-on(table[:, 0]) * of_m).to(inputs[NOISE].dtype)
    if needs[X0]:
        of_error = on(2 * of_x0) * found.x0_error
        if args.target != "x_prev":
            of_error = of_error + on(of_bound * coef1) * found.of_difference
        gradient = torch.where(clipped, of_error, 0.0)
        if args.x0_in_target:
            gradient = gradient - on(table[:, 1]) * of_m
        grads[X0] = gradient.to(inputs[X0].dtype)
    if not needs[COEFFICIENTS]:
        return

    def sums(values: Tensor) -> Tensor:
        return flat_samples(values.double()).sum(1)

    none = torch.zeros_like(x0_scale)
    of_residual = found.of_difference * found.residual
    by_scale = 2 * of_x0 * sums(torch.where(clipped, 0.0, found.x0_error * found.residual))
    if args.target == "x_prev":
        by_scale = by_scale + of_bound * coef1 * sums(of_residual)
        by_coef1 = of_bound * x0_scale * sums(of_residual)
    else:
        by_scale = by_scale + of_bound * coef1 * sums(torch.where(clipped, 0.0, of_residual))
        by_coef1 = of_bound * sums(found.of_difference * found.x0_error)
    rows = torch.stack(
        [
            none if found.y is None else -sums(of_m * found.y),
            -sums(of_m * found.x0) if args.x0_in_target else none,
            by_scale,
            by_coef1,
            of_vb * sums(found.of_log_var),
            of_vb * sums(found.of_delta),
            none if found.variance_channels is None else of_vb * sums(found.of_delta * found.variance_channels),
        ],
        dim=1,
    )
    members = args.t.unsqueeze(0) == torch.arange(len(args.coefficients), device=args.t.device).unsqueeze(1)
    # Where nobody is a member a NaN must not enter.
    gradient = torch.where(members.unsqueeze(-1), rows, 0.0).sum(1)
    grads[COEFFICIENTS] = gradient.to(args.coefficients.dtype)
