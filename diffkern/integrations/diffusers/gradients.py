"""Gradients through what a step remembers: solver_step differentiates its result alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.ops import solver_step
from diffkern.solvers import StepProgram


def wanted(*tensors: Tensor) -> bool:
    """Whether somebody may ask for a gradient with respect to any of what a step reads."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def remembered(
    program: StepProgram, row: int, model_output: Tensor, sample: Tensor, slots: Sequence[Tensor]
) -> dict[int, Tensor]:
    """The tensors that a row writes, by slot, of sample's shape and dtype, as functions of what they come from."""
    x0 = solver_step(sample, model_output, program.x0_program(), row)
    assert isinstance(x0, Tensor)
    compute = torch.promote_types(sample.dtype, torch.float32)
    operands = {"x": sample, "m": model_output[:, : sample.shape[1]] if sample.dim() > 1 else model_output, "0": x0}
    operands |= {f"h{k}": slot for k, slot in enumerate(slots)}
    written = {}
    for j, slot in enumerate(program.writes[row].tolist()):
        if slot >= 0:
            weights = {name: float(program.column(f"g{j}_{name}")[row]) for name in operands}
            terms = [weight * operands[name].to(compute) for name, weight in weights.items() if weight]
            written[slot] = torch.stack(terms).sum(0).to(sample.dtype) if terms else torch.zeros_like(sample)
    return written


def through_history(x_next: Tensor, program: StepProgram, row: int, slots: Sequence[Tensor]) -> Tensor:
    """x_next, which has read the slots, with their gradients."""
    for k, slot in enumerate(slots):
        weight = float(program.column(f"c_h{k}")[row])
        if weight and slot.requires_grad:
            x_next = x_next + weight * (slot - slot.detach())  # of value 0
    return x_next
