"""Arguments that solver_step and the reductions before it share: what they may be, and the tensors they become."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffkern.ops._checks import check_device, check_index, check_like
from diffkern.ops._noise import python_int

if TYPE_CHECKING:
    from diffkern.solvers.program import StepProgram


def row_tensor(row: int | Tensor, x: Tensor, program: StepProgram) -> Tensor:
    number = python_int(row)
    if number is not None:
        if not 0 <= number < program.num_rows:
            raise ValueError(f"row must lie in [0, {program.num_rows}), got {number}")
        return torch.full((), number, dtype=torch.int64, device=x.device)
    check_index("row", row, "x", x, [(), (x.shape[0],)])
    assert isinstance(row, Tensor)
    return row


def check_model_output(model_output: Tensor, x: Tensor, program: StepProgram, guided: bool) -> None:
    learned = program.variance != "fixed"
    if learned and x.dim() < 2:
        raise ValueError(f"x must have a channel axis for a learned variance, got shape {tuple(x.shape)}")
    samples = x.shape[0] * (2 if guided else 1)
    shape = (samples, x.shape[1] * 2, *x.shape[2:]) if learned else (samples, *x.shape[1:])
    reason = "x" + (" with guidance" if guided else "") + (" and a learned variance" if learned else "")
    check_like("model_output", model_output, reason, x, shape)


def guidance_tensor(value: float | Tensor | None, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if tuple(value.shape) not in ((), (x.shape[0],)):
            raise ValueError(f"guidance_scale must have shape () or {(x.shape[0],)}, got {tuple(value.shape)}")
        check_device("guidance_scale", value, "x", x)
        return value.double()
    if not isinstance(value, int | float | np.floating):
        raise TypeError(f"guidance_scale must be a number or a tensor, got {type(value).__name__}")
    return torch.full((), float(value), dtype=torch.float64, device=x.device)


def mean_channels(model_output: Tensor, x: Tensor, program: StepProgram) -> Tensor:
    """model_output without the channels of a learned variance."""
    return model_output if program.variance == "fixed" else model_output[:, : x.shape[1]]
