"""The gradient of vb_terms: by model_output the kernel of vb_terms_and_grad, by everything else plain PyTorch.

Without a clip every term is a function of the residual m − (of_y·y + of_x0·x0), of the variance's channels and of the
timestep's numbers, so that with G the gradient by the mean's channels (docs/vb_terms.md):

    ∂y = −of_y·G    ∂x0 = −of_x0·G    ∂of_y = −<G, y>    ∂of_x0 = −<G, x0>

and the other numbers have sums of the same kind. A term whose gradient is stopped at the mean is stopped here as well.
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
    if args.clip is not None:
        raise RuntimeError("vb_terms with a clip has a gradient by model_output alone, not by x0, noise or tables")
    found = elements(args)
    of_m = of_mean(args, found, scale)
    table = gather(args.coefficients, args.t)

    def times(column: int) -> Tensor:
        return per_sample(table[:, column].to(of_m.dtype), of_m) * of_m

    if needs[NOISE]:
        grads[NOISE] = (-times(0)).to(inputs[NOISE].dtype)
    if needs[X0]:
        grads[X0] = (-times(1)).to(inputs[X0].dtype) if args.x0_in_target else torch.zeros_like(inputs[X0])
    if not needs[COEFFICIENTS]:
        return

    def sums(values: Tensor) -> Tensor:
        return flat_samples(values.double()).sum(1)

    _, of_vb, of_x0 = per_element_scales(scale, found.residual)
    x0_scale, coef1 = table[:, 2], table[:, 3]
    none = torch.zeros_like(x0_scale)
    by_scale = 2 * of_x0 * sums(found.x0_error * found.residual)
    by_coef1 = none
    if not args.stops_mean:
        together = of_vb * sums(found.of_difference * found.residual)
        by_scale, by_coef1 = by_scale + coef1 * together, x0_scale * together
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
