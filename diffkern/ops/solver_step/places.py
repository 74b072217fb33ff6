"""Where a kernel of solver_step writes: straight to the caller's tensors where that may be, else beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.ops._layout import is_channels_last


@dataclass
class Places:
    """`result` and `slots` as the kernel takes them: x' goes to the one, each of the others stays where it is read.

    Once the kernel has run, `finish` copies what has to lie elsewhere, and gives the op's first and third output.
    """

    result: Tensor
    slots: list[Tensor]
    in_place: list[Tensor]  # tensors of the caller's among them that the kernel writes
    out: Tensor | None
    targets: Sequence[Tensor | None]
    new_slots: Tensor

    def finish(self) -> tuple[Tensor, Tensor]:
        # autograd learns of what was written through an address only from here.
        torch.autograd.graph.increment_version(self.in_place)
        if self.out is not None and self.out is not self.result:
            self.out.copy_(self.result)
        for target, slot in zip(self.targets, self.slots, strict=True):
            if target is not None and target is not slot:
                target.copy_(slot)
        return self.result if self.out is None else self.out, self.new_slots


def places(
    x: Tensor,
    slots: Tensor | Sequence[Tensor] | None,
    out: Tensor | None,
    slots_out: Sequence[Tensor | None] | None,
    read: Sequence[Tensor | None],
    output_like: Callable[[Tensor], Tensor],
) -> Places:
    """`read`: the operands besides the slots. `output_like`: room for a result.

    `slots_out` says which of the slots the row may write; without it all are copied, since none may change.
    """
    operands = [value for value in read if value is not None]
    direct = out is not None and _writable(out, x, operands)
    result = out if out is not None and direct else output_like(x)
    history = [] if slots is None else list(slots)
    new_slots = x.new_empty(0)
    targets: list[Tensor | None]
    if slots_out is not None:
        targets = list(slots_out)
    else:
        if slots is not None:
            new_slots = torch.empty((len(history), *x.shape), dtype=x.dtype, device=x.device)
        targets = list(new_slots) if history else []
    in_place = [result] if direct else []
    for k, target in enumerate(targets):
        if target is None:
            continue
        if target is history[k] and _writable(target, x, operands):
            in_place.append(target)
        elif slots_out is None and not is_channels_last(x):
            history[k] = target.copy_(history[k])
        else:
            history[k] = output_like(x).copy_(history[k])
    return Places(result, history, in_place, out, targets, new_slots)


def _writable(target: Tensor, x: Tensor, read: Sequence[Tensor]) -> bool:
    """Whether a result for x can go straight to `target`: dense in the same order, and each element read before it is
    written, so `target` is one of the tensors read or apart from them all.
    """
    if not (is_channels_last(target) if is_channels_last(x) else target.is_contiguous()):
        return False
    storage = target.untyped_storage().data_ptr()
    return all(
        (value.dtype == target.dtype and value.data_ptr() == target.data_ptr() and value.stride() == target.stride())
        or value.untyped_storage().data_ptr() != storage
        for value in read
    )
