"""A program's table as tensors on a device, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffkern.solvers.program import StepProgram

_TENSORS: WeakKeyDictionary[StepProgram, dict[torch.device, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def program_tensors(program: StepProgram, device: torch.device) -> tuple[Tensor, Tensor]:
    """(coefficients float64 (R, K), writes int64 (R, 2)) on `device`, cached as long as the program lives."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        # What is made here belongs to the trace, mode or transform, and is of no use after it.
        return _made(program, device)
    by_device = _TENSORS.setdefault(program, {})
    if device not in by_device:
        with torch.inference_mode(False):
            by_device[device] = _made(program, device)
    return by_device[device]


def _made(program: StepProgram, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(program.coefficients, device=device), torch.tensor(program.writes, device=device)


# A trace takes the result as a constant; if it saw the arrays, an exported program would be left with fake tensors.
# This is what torch.compiler.assume_constant_result does, without the second that loading dynamo takes.
_made._dynamo_marked_constant = True  # type: ignore[attr-defined]
