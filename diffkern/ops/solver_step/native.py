"""solver_step through csrc/cpu/solver_step.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import is_channels_last, sample_dense, sample_shape
from diffkern.ops._native import OperandTuple, about_to_write, cpu_only, num_threads, operand, output_like
from diffkern.ops.solver_step.places import places


class _Operands:
    """Prepares operands in the state's order and keeps them alive during the call."""

    def __init__(self, x: Tensor) -> None:
        self.channels_last = is_channels_last(x)
        self.dtype = torch.float64 if x.dtype == torch.float64 else None
        self._alive: list[Tensor] = []

    def read(self, value: Tensor | None) -> OperandTuple | None:
        if value is None:
            return None
        wanted = self.dtype or (torch.float32 if value.dtype == torch.float64 else None)
        value = sample_dense(value, self.channels_last, wanted)
        self._alive.append(value)
        return operand(value)

    def write(self, value: Tensor) -> OperandTuple:
        return operand(value.movedim(1, -1) if self.channels_last else value)

    def keep(self, value: Tensor) -> Tensor:
        self._alive.append(value)
        return value


def solver_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    writes: Tensor,
    row: Tensor,
    slots: Tensor | Sequence[Tensor] | None,
    guidance_scale: Tensor | None,
    guidance_rescale: Tensor | None,
    threshold: Tensor | None,
    extra: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    samples: Tensor | None,
    stream: int,
    clip: list[float] | None,
    variance: int,
    scales_input: bool,
    out: Tensor | None = None,
    slots_out: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _Operands(x)
    to = places(x, slots, out, slots_out, (x, model_output, extra, noise), output_like)
    for value in to.in_place:
        if value is not out:
            about_to_write(value)
    x_in = output_like(x) if scales_input else x.new_empty(0)
    mean = model_output[:, : x.shape[1]] if variance else model_output
    var = model_output[model_output.shape[0] - x.shape[0] :, x.shape[1] :] if variance else None
    samples_in_x = x.shape[0]
    uncond, cond = (mean, None) if guidance_scale is None else (mean[:samples_in_x], mean[samples_in_x:])
    row, writes = operands.keep(row.contiguous()), operands.keep(writes.contiguous())
    source = None
    if seed is not None and samples is not None:
        samples = operands.keep(samples.contiguous())
        source = (seed.data_ptr(), row.data_ptr(), row.dim() > 0, samples.data_ptr(), samples.dim() > 0, stream)
    scalars = [
        None if value is None else operands.keep(value.double().contiguous()).data_ptr()
        for value in (guidance_scale, guidance_rescale, threshold)
    ]
    native_module().solver_step(
        shape=sample_shape(x),
        x=operands.read(x),
        uncond=operands.read(uncond),
        cond=operands.read(cond),
        var=operands.read(var),
        extra=operands.read(extra),
        noise=operands.read(noise),
        source=source,
        table=table.data_ptr(),
        num_rows=table.shape[0],
        num_columns=table.shape[1],
        writes=writes.data_ptr(),
        row=row.data_ptr(),
        row_per_sample=row.dim() > 0,
        guidance_scale=scalars[0],
        guidance_per_sample=guidance_scale is not None and guidance_scale.dim() > 0,
        guidance_rescale=scalars[1],
        threshold=scalars[2],
        clip=clip,
        variance=variance,
        slots=[
            operands.read(slot) if target is None else operands.write(slot)
            for slot, target in zip(to.slots, to.targets, strict=True)
        ],
        out=operands.write(to.result),
        x_in=operands.write(x_in) if scales_input else None,
        num_threads=num_threads(x.numel()),
    )
    result, new_slots = to.finish()
    return result, x_in, new_slots


def solver_step_unsupported(x: Tensor, *rest: object) -> str | None:
    slots = rest[4]
    if isinstance(slots, Tensor | Sequence) and len(slots) > 8:
        return f"the kernel holds 8 slots, the program has {len(slots)}"
    return cpu_only(x)
