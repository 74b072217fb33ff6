"""The eager engine: one model call and one `solver_step` a row, from a Python loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.ops import solver_step
from diffkern.sampling.self_condition import SelfConditioned
from diffkern.solvers import StepProgram


@dataclass(frozen=True)
class Guidance:
    """What steers the steps beside the network: `scale` w and `rescale` φ of classifier-free guidance, None without,
    and `gradient(x, row)`, the e of the equations, like x, which the rows of a program with a classifier read."""

    scale: float | None = None
    rescale: float | None = None
    gradient: Callable[[Tensor, int], Tensor] | None = None


def run(
    network: Callable[..., Tensor],
    program: StepProgram | SelfConditioned,
    x: Tensor,
    seed: int,
    first: int,
    guidance: Guidance,
    *,
    keep_states: bool,
) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor]]:
    """Yield (row, x before, model output, x after) for every row of `program`, starting from x (N, C, H, W), dense.

    `network(x, row)` is the model's output; of a SelfConditioned program it is `network(x, row, x_self_cond)`, with the
    x0 of its call before, like x and zeros at first. Row 0 sees x; a program that scales the network's input says what
    the later rows call it on. A row that calls no network has None for its output. `first` is the number of the first
    image, by which its noise is found. With `keep_states` every x is a tensor of its own; without, two buffers take
    turns and an x lasts until the row after next. x itself is not written.
    """
    x0_program, x_self_cond = None, list[Tensor]()  # the latter holds one, or none
    if isinstance(program, SelfConditioned):
        x0_program, x_self_cond = program.x0_program, [torch.zeros_like(x)]
        program = program.program
    buffers: list[Tensor | None] = [None, None] if keep_states else [torch.empty_like(x), torch.empty_like(x)]
    slots = _empty_slots(program, x)
    x_in = x
    for row in range(program.num_rows):
        output = network(x_in, row, *x_self_cond) if program.calls_network[row] else None
        step = solver_step(
            x,
            _unread_output(program, x, guidance) if output is None else output,
            program,
            row,
            slots=slots,
            guidance_scale=guidance.scale,
            guidance_rescale=guidance.rescale,
            extra=None if guidance.gradient is None or output is None else guidance.gradient(x, row),
            seed=seed,
            samples=first,
            out=buffers[row % 2],
        )
        x_next, x_in = (step, step) if isinstance(step, Tensor) else step
        if x_self_cond and output is not None:
            if x0_program is None:
                assert slots is not None
                x_self_cond = [slots[-1]]
            else:
                x_self_cond = [predicted_x0(x, output, x0_program, row, guidance)]
        yield row, x, output, x_next
        x = x_next


def _empty_slots(program: StepProgram, x: Tensor) -> Tensor | None:
    """Memory for what `program` remembers, (S, N, C, H, W), each slot in x's own order, so that kernels write in it."""
    if program.num_slots == 0:
        return None
    shape, strides = (program.num_slots, *x.shape), (x.numel(), *x.stride())
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def _unread_output(program: StepProgram, x: Tensor, guidance: Guidance) -> Tensor:
    """A tensor of the shape of the model's output, for rows whose coefficients of it are 0."""
    n, channels, *rest = x.shape
    doubled, variance = guidance.scale is not None, program.variance != "fixed"
    return x.new_zeros((n * (1 + doubled), channels * (1 + variance), *rest))


def predicted_x0(x: Tensor, output: Tensor, program: StepProgram, row: int, guidance: Guidance) -> Tensor:
    """x0 (N, C, H, W) as the row of `program`, an `x0_program`, has it from x and the model's output there."""
    x0 = solver_step(x, output, program, row, guidance_scale=guidance.scale, guidance_rescale=guidance.rescale)
    assert isinstance(x0, Tensor)
    return x0
