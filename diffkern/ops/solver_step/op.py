"""One step of any solver: a row of a StepProgram in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern.ops._checks import check_floating, check_like
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._noise import Noise, draws_in_kernel, python_int, resolve_noise
from diffkern.ops._program_tensors import program_tensors
from diffkern.ops._registry import Op
from diffkern.ops._step_arguments import check_model_output, guidance_tensor, mean_channels, row_tensor
from diffkern.ops.dynamic_threshold.op import OP as DYNAMIC_THRESHOLD
from diffkern.ops.guidance_rescale.op import OP as GUIDANCE_RESCALE
from diffkern.ops.solver_step.backward import solver_step_backward

if TYPE_CHECKING:
    from diffkern.solvers.program import StepProgram

VARIANCES = ("fixed", "learned", "learned_range")
SLOTS, NOISE = 5, 10  # positions among the arguments of the registered op

_NONE = Noise(None, None, None, None)


def solver_step(
    x: Tensor,
    model_output: Tensor,
    program: StepProgram,
    row: int | Tensor,
    *,
    slots: Tensor | Sequence[Tensor] | None = None,
    guidance_scale: float | Tensor | None = None,
    guidance_rescale: float | None = None,
    extra: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    samples: int | Tensor = 0,
    stream: int = 2,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Executes row `row` of `program` (diffkern.solvers.StepProgram; the equations stand there).

    x: the state (N, C, …), float32, bfloat16, float16 or float64, any strides.
    model_output: (N, C, …); (N, 2C, …) = [mean; variance] on axis 1 if the program's variance is learned; with guidance
        twice as many samples, [uncond; cond], the variance taken from cond. Any floating dtype.
    row: int, or int64 tensor () or (N,) on x's device. It is also the draw of the noise.
    slots: (S, N, C, …), or a sequence of S tensors (N, C, …), of x's dtype: the remembered tensors, written where the
        row says so; required if the program has slots. What is written lies apart from the other tensors of the call,
        or is one of them. Writing is not differentiated.
    guidance_scale: w of classifier-free guidance, a number or a tensor () or (N,): m = u + w·(c − u) (Ho & Salimans
        2022 with w counted from 0 as diffusers does). guidance_rescale: φ of Lin et al. 2023, in [0, 1].
    extra: e of the equations, of x's shape (a classifier's gradient), read by rows with c_e or c_v.
    Noise, for rows with c_z ≠ 0: exactly one of noise (x's shape), seed (with samples, stream; the draw is the row),
        generator (the numbers of torch.randn_like(x)). A program without such rows needs none; one with them must be
        given its source at every row.
    out: where x' goes, of x's shape and dtype, dense; may be x itself. Not for calls that need gradients.

    Returns x', or (x', s·x') if the program scales the network's input. x' has x's dtype and memory format; arithmetic
    in float32 (float64 for float64 x). An operand whose coefficients are all zero is not read.
    Gradients flow to x, model_output and extra. Raises ValueError or TypeError naming the argument; a row out of range
    raises ValueError on a CPU and gives NaN elsewhere.
    """
    check_floating("x", x)
    rows = row_tensor(row, x, program)
    guided = guidance_scale is not None
    check_model_output(model_output, x, program, guided)
    _check_slots(slots, x, program)
    if extra is not None:
        check_like("extra", extra, "x", x)
    # Whether the kernel may make the generator's numbers itself, of which each row then gets what torch would draw.
    may_draw = x.is_cuda and generator is not None and noise is None and seed is None
    may_draw = may_draw and program.makes_noise and rows.dim() == 0
    source = _NONE if may_draw else _noise_source(x, program, noise, seed, samples, stream, generator)
    scale = guidance_tensor(guidance_scale, x)
    if guidance_rescale is not None and not isinstance(guidance_rescale, int | float):
        raise TypeError(f"guidance_rescale must be a number, got {type(guidance_rescale).__name__}")
    if guidance_rescale is not None and not (guided and 0 <= guidance_rescale <= 1):
        raise ValueError(f"guidance_rescale must lie in [0, 1] and needs guidance_scale, got {guidance_rescale}")

    table, writes = program_tensors(program, x.device)
    rescale = threshold = None
    if guidance_rescale:
        rescale = GUIDANCE_RESCALE(mean_channels(model_output, x, program), scale, float(guidance_rescale))
    if program.threshold is not None:
        mean, (ratio, largest) = mean_channels(model_output, x, program), program.threshold
        threshold = DYNAMIC_THRESHOLD(x, mean, table, rows, scale, rescale, float(ratio), float(largest))
    clip = program.clip if program.clip is not None or program.threshold is None else (-1.0, 1.0)
    arguments: tuple[Any, ...] = (
        x,
        model_output,
        table,
        writes,
        rows,
        slots,
        scale,
        rescale,
        threshold,
        extra,
        source.given,
        source.seed,
        source.samples,
        stream,
        None if clip is None else [float(clip[0]), float(clip[1])],
        VARIANCES.index(program.variance),
        program.scales_input,
    )
    if out is not None:
        _check_out(out, x)
    draws = None
    if may_draw and generator is not None:
        draws = draws_in_kernel(OP, (*arguments, *_each(slots)), x, generator)
        if draws is None:
            drawn = _noise_source(x, program, None, None, samples, stream, generator).given
            arguments = (*arguments[:NOISE], drawn, *arguments[NOISE + 1 :])
    writes_in_place = (out is not None or slots is not None) and OP.bypasses_autograd((*arguments, *_each(slots)))
    if draws is not None or writes_in_place:
        history = _each(slots)
        written = _written(history, program, row)
        rest = (*arguments[SLOTS + 1 :], out, written)
        x_next, x_in, _ = OP.run(*arguments[:SLOTS], history or None, *rest, *(() if draws is None else (draws,)))
    else:
        stacked = slots if slots is None or isinstance(slots, Tensor) else torch.stack(list(slots))
        x_next, x_in, new_slots = OP(*arguments[:SLOTS], stacked, *arguments[SLOTS + 1 :])
        _store(new_slots.detach(), slots, program, row)
    if out is not None and x_next is not out:
        if x_next.requires_grad:
            raise ValueError("out cannot be used where a gradient is wanted: leave it out, or use torch.no_grad()")
        x_next = out.copy_(x_next)
    return (x_next, x_in) if program.scales_input else x_next


def _each(slots: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The slots one by one; a buffer's as views of it."""
    if isinstance(slots, Tensor):
        return slots.unbind(0)
    return () if slots is None else slots


def _written(slots: Sequence[Tensor], program: StepProgram, row: int | Tensor) -> list[Tensor | None]:
    """The slots that the row may write, None in the place of the others."""
    number = python_int(row)
    if number is not None:
        return [slot if k in program.written[number] else None for k, slot in enumerate(slots)]
    return [slot if any(k in row for row in program.written) else None for k, slot in enumerate(slots)]


def _store(values: Tensor, slots: Tensor | Sequence[Tensor] | None, program: StepProgram, row: int | Tensor) -> None:
    """Puts the slots' values after the step, (S, N, C, …), where the caller has them."""
    if isinstance(slots, Tensor):
        slots.copy_(values)
    elif slots is not None:
        for k, target in enumerate(_written(slots, program, row)):
            if target is not None:
                target.copy_(values[k])


def _check_slots(slots: Tensor | Sequence[Tensor] | None, x: Tensor, program: StepProgram) -> None:
    if program.num_slots == 0:
        if slots is not None:
            raise ValueError("slots must be None: this program has none")
        return
    if slots is None:
        raise ValueError(f"slots must be given: this program has {program.num_slots}")
    if isinstance(slots, Tensor):
        check_like("slots", slots, "x and the program", x, (program.num_slots, *x.shape))
        slots = (slots,)
    else:
        if len(slots) != program.num_slots:
            raise ValueError(f"slots must be {program.num_slots} tensors for this program, got {len(slots)}")
        for k, slot in enumerate(slots):
            check_like(f"slots[{k}]", slot, "x", x)
    for slot in slots:
        if slot.dtype != x.dtype:
            raise TypeError(f"slots must have x's dtype {x.dtype}, got {slot.dtype}")


def _check_out(out: Tensor, x: Tensor) -> None:
    check_like("out", out, "x", x)
    if out.dtype != x.dtype:
        raise TypeError(f"out must have x's dtype {x.dtype}, got {out.dtype}")


def _noise_source(
    x: Tensor,
    program: StepProgram,
    noise: Tensor | None,
    seed: int | Tensor | None,
    samples: int | Tensor,
    stream: int,
    generator: torch.Generator | None,
) -> Noise:
    if not program.makes_noise and noise is None and seed is None and generator is None:
        return _NONE
    return resolve_noise(x, "x", noise=noise, seed=seed, generator=generator, draw=0, samples=samples, stream=stream)


def _fake(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    writes: Tensor,
    row: Tensor,
    slots: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    x_in = empty_like_layout(x) if scales_input else x.new_empty(0)
    new_slots = x.new_empty(0) if slots is None else torch.empty(slots.shape, dtype=x.dtype, device=x.device)
    return empty_like_layout(x), x_in, new_slots


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The slots' values are not needed, and the caller may overwrite them before the backward pass.
    tensors = [(i, value) for i, value in enumerate(inputs) if isinstance(value, Tensor) and i != SLOTS]
    ctx.save_for_backward(*(value for _, value in tensors))
    ctx.positions = [i for i, _ in tensors]
    ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    inputs = list(ctx.inputs)
    for position, value in zip(ctx.positions, ctx.saved_tensors, strict=True):
        inputs[position] = value
    return solver_step_backward(inputs, grads[0], grads[1], ctx.needs_input_grad)


OP = Op(
    "solver_step(Tensor x, Tensor model_output, Tensor table, Tensor writes, Tensor row, Tensor? slots, "
    "Tensor? guidance_scale, Tensor? guidance_rescale, Tensor? threshold, Tensor? extra, Tensor? noise, Tensor? seed, "
    "Tensor? samples, int stream, float[]? clip, int variance, bool scales_input) -> (Tensor, Tensor, Tensor)",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
