"""The bound of dynamic thresholding: a quantile of a sample's predicted magnitudes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern.ops._checks import check_floating, check_like
from diffkern.ops._program_tensors import program_tensors
from diffkern.ops._registry import Op
from diffkern.ops._step_arguments import check_model_output, guidance_tensor, mean_channels, row_tensor
from diffkern.ops.dynamic_threshold.backward import dynamic_threshold_backward

if TYPE_CHECKING:
    from diffkern.solvers.program import StepProgram


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    program: StepProgram,
    row: int | Tensor,
    *,
    guidance_scale: float | Tensor | None = None,
    rescale: Tensor | None = None,
) -> Tensor:
    """s_n = clamp(quantile(|x0|, ratio), 1, max) over sample n (Saharia et al. 2022, arXiv 2205.11487, §2.3).

    x0 = a_x·x + a_m·m with the coefficients of `row`, and m = r·(u + w·(c − u)) under guidance; (ratio, max) is
    `program.threshold`, which must not be None. The quantile is exact and linearly interpolated between two order
    statistics of the very values that solver_step clamps.

    x, model_output, row, guidance_scale: as for solver_step, which calls this op by itself.
    rescale: r, floating (N,) on x's device, of `guidance_rescale`; None for 1. Needs guidance_scale.

    Returns float64 (N,), 1 for an empty sample. x0 is in float32 (float64 for float64 x), the interpolation in float64.
    A NaN orders behind every number, so it counts once the quantile reaches it. NaN or Inf in one sample stays in it.
    Gradients (docs/solver_step.md) flow to x, model_output and rescale. Raises ValueError or TypeError naming the
    argument; a row out of range raises ValueError on a CPU and gives NaN elsewhere.
    """
    check_floating("x", x)
    if program.threshold is None:
        raise ValueError("program must have a threshold, got one without")
    rows = row_tensor(row, x, program)
    check_model_output(model_output, x, program, guidance_scale is not None)
    scale = guidance_tensor(guidance_scale, x)
    if rescale is not None:
        if scale is None:
            raise ValueError("rescale needs guidance_scale")
        check_like("rescale", rescale, "x", x, (x.shape[0],))
        rescale = rescale.double()
    (ratio, largest), mean = program.threshold, mean_channels(model_output, x, program)
    table, _ = program_tensors(program, x.device)
    return OP(x, mean, table, rows, scale, rescale, float(ratio), float(largest))


def _fake(
    x: Tensor,
    mean: Tensor,
    table: Tensor,
    row: Tensor,
    guidance_scale: Tensor | None,
    rescale: Tensor | None,
    ratio: float,
    largest: float,
) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ratio, ctx.largest = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, table, row, guidance_scale, rescale = ctx.saved_tensors
    d_x, d_mean, d_rescale = dynamic_threshold_backward(
        x, mean, table, row, guidance_scale, rescale, ctx.ratio, ctx.largest, grad
    )
    return d_x, d_mean, None, None, None, d_rescale, None, None


OP = Op(
    "dynamic_threshold(Tensor x, Tensor mean, Tensor table, Tensor row, Tensor? guidance_scale, Tensor? rescale, "
    "float ratio, float largest) -> Tensor",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
