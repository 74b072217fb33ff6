"""solver_step on a GPU: a row of the program for every sample, in one launch.

Reads each operand whose coefficients are not all zero once, and writes x' (and h', s·x') once: 12 bytes an element for
a DDPM step in float32 with its own noise, 6 in 16 bits. That takes 67 and 57 instructions an element, of which an H200
can issue 83 and 41 in the time that its memory takes: float32 is bound by memory, 16 bits with noise by instructions.
DDIM and DPM-Solver++ 2M have 20 and 36 in float32, and are bound by memory in every dtype.

Which row a sample has, its coefficients and the slots that it writes are read on the device, so every test of a
coefficient is one for a whole program of the grid; what a call does without altogether (guidance, slots, …) is not
compiled. Every element is read before it is written, by the program that writes it: x' may go over an operand, and
slots are written where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._indices import check_values
from diffkern.ops._layout import empty_like_layout, float32_dense, sample_dense, sample_shape
from diffkern.ops._terms import FIXED
from diffkern.ops._torch_draws import TorchDraws
from diffkern.ops._triton import launch
from diffkern.ops._triton.elementwise import tiling, torch_tiling
from diffkern.ops._triton.step import guided_mean, inside_if, mean_arguments, predicted_x0, row_of
from diffkern.ops._triton.tile import TORCH, normals, place
from diffkern.ops.solver_step.launch_choices import choose
from diffkern.ops.solver_step.places import places

MOST_SLOTS = 8

_A_X, _A_M, _C_X, _C_Z, _C_E, _C_V, _S, _LOG_VAR_MIN, _LOG_VAR_MAX = (
    tl.constexpr(FIXED.index(name))
    for name in ("a_x", "a_m", "c_x", "c_z", "c_e", "c_v", "s", "log_var_min", "log_var_max")
)
_HISTORY = tl.constexpr(len(FIXED))
_NO_NOISE, _GIVEN, _GENERATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LEARNED_RANGE = tl.constexpr(2)
_HALF_LOG2_E = tl.constexpr(0.7213475204444817)


@triton.jit
def _weights(fixed, of_slots, active, valid, SLOTS: tl.constexpr):
    """Coefficients of (x, m, x0, each slot), from two addresses; 0 unless `active`, NaN if the row is not valid."""
    of_x = tl.where(valid, tl.load(fixed, active, 0.0).to(tl.float32), float("nan"))
    weights: tl.tuple = (of_x,)
    for k in tl.static_range(2):
        weights += (tl.load(fixed + 1 + k, active, 0.0).to(tl.float32),)
    for k in tl.static_range(SLOTS):
        weights += (tl.load(of_slots + k, active, 0.0).to(tl.float32),)
    return weights


@triton.jit
def _combination(weights, operands, BLOCK: tl.constexpr, TERMS: tl.constexpr):
    """The sum of weights·operands; an operand whose weight is 0 is not looked at."""
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TERMS):
        if weights[k] != 0:
            total += weights[k] * operands[k]
    return total


@triton.jit(do_not_specialize=["seed", "call"])
def solver_step_kernel(
    x,
    x_stride,
    uncond,
    uncond_stride,
    cond,
    cond_stride,
    guidance_scale,
    guidance_rescale,
    var,
    var_stride,
    extra,
    extra_stride,
    noise,
    noise_stride,
    slots,
    slot_strides,
    out,
    x_in,
    table,
    num_rows,
    writes,
    row,
    threshold,
    clip_low,
    clip_high,
    seed,
    call,
    samples,
    stream,
    blocks,
    size,
    channels,
    pixels,
    ROWS: tl.constexpr,
    GUIDED: tl.constexpr,
    SCALES: tl.constexpr,
    RESCALED: tl.constexpr,
    CLIPS: tl.constexpr,
    VARIANCE: tl.constexpr,
    NOISE: tl.constexpr,
    FAST: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr,
    WRITTEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, base, offsets, inside, counter, lane = place(
        tl.program_id(0), blocks, size, channels, pixels, BLOCK, ORDER, WIDTH
    )
    index, valid = row_of(row, n, num_rows, ROWS)
    c = table + index * (_HISTORY + 6 + 3 * SLOTS)
    weights = _weights(c + _C_X, c + _HISTORY, valid, valid, SLOTS)
    reads_x, reads_m, reads_x0 = weights[0] != 0, weights[1] != 0, weights[2] != 0
    if WRITTEN != 0:
        target0, target1 = tl.load(writes + 2 * index), tl.load(writes + 2 * index + 1)
        first = c + _HISTORY + SLOTS
        weights0 = _weights(first, first + 3, target0 >= 0, valid, SLOTS)
        weights1 = _weights(first + 3 + SLOTS, first + 6 + SLOTS, target1 >= 0, valid, SLOTS)
        reads_x = reads_x | (weights0[0] != 0) | (weights1[0] != 0)
        reads_m = reads_m | (weights0[1] != 0) | (weights1[1] != 0)
        reads_x0 = reads_x0 | (weights0[2] != 0) | (weights1[2] != 0)
    a_x = tl.where(reads_x0, tl.load(c + _A_X).to(tl.float32), 0.0)
    a_m = tl.where(reads_x0, tl.load(c + _A_M).to(tl.float32), 0.0)
    reads_x = reads_x | (a_x != 0)
    reads_m = reads_m | (a_m != 0)
    state = tl.load(x + n * x_stride + base + offsets, inside_if(inside, reads_x), 0.0).to(tl.float32)
    m = guided_mean(
        uncond, uncond_stride, cond, cond_stride, guidance_scale, guidance_rescale, n, base, offsets,
        inside_if(inside, reads_m), GUIDED, SCALES, RESCALED,
    )  # fmt: skip
    history: tl.tuple = ()
    for k in tl.static_range(SLOTS):
        reads = weights[3 + k] != 0
        if WRITTEN != 0:
            reads = reads | (weights0[3 + k] != 0) | (weights1[3 + k] != 0)
        h = tl.load(slots[k] + n * slot_strides[k] + base + offsets, inside_if(inside, reads), 0.0).to(tl.float32)
        history += (h,)
    c_z = tl.load(c + _C_Z).to(tl.float32)
    c_e = tl.load(c + _C_E).to(tl.float32)
    c_v = tl.load(c + _C_V).to(tl.float32)
    if NOISE == _GIVEN:
        z = tl.load(noise + n * noise_stride + base + offsets, inside_if(inside, c_z != 0), 0.0).to(tl.float32)
    if extra is not None:
        e = tl.load(extra + n * extra_stride + base + offsets, inside_if(inside, (c_e != 0) | (c_v != 0)), 0.0).to(
            tl.float32
        )
    if VARIANCE != 0:
        reads_var = c_z != 0
        if extra is not None:
            reads_var = reads_var | (c_v != 0)
        half_log_var = tl.load(var + n * var_stride + base + offsets, inside_if(inside, reads_var), 0.0).to(tl.float32)

    x0 = tl.zeros([BLOCK], tl.float32)
    if reads_x0:
        x0 = predicted_x0(a_x, state, a_m, m)
        if CLIPS:
            if threshold is not None:
                x0 = x0 * tl.div_rn(1.0, tl.load(threshold + n).to(tl.float32))
            x0 = tl.minimum(x0, clip_high, propagate_nan=tl.PropagateNan.ALL)
            x0 = tl.maximum(x0, clip_low, propagate_nan=tl.PropagateNan.ALL)
    operands: tl.tuple = (state, m, x0)
    operands += history
    total = _combination(weights, operands, BLOCK, 3 + SLOTS)
    if VARIANCE != 0:
        if VARIANCE == _LEARNED_RANGE:
            low = tl.load(c + _LOG_VAR_MIN).to(tl.float32) * _HALF_LOG2_E
            high = tl.load(c + _LOG_VAR_MAX).to(tl.float32) * _HALF_LOG2_E
            fraction = half_log_var * 0.5 + 0.5
            sigma = tl.exp2(fraction * high + (1.0 - fraction) * low)
        else:
            sigma = tl.exp2(half_log_var * _HALF_LOG2_E)
    if NOISE != _NO_NOISE and c_z != 0:
        if NOISE == _GENERATED:
            if ORDER == TORCH:
                z = normals(counter, lane, n, seed, call, samples, stream, False, False, BLOCK, ORDER, FAST)
                z = z.to(out.dtype.element_ty).to(tl.float32)  # torch would have stored it
            else:
                z = normals(counter, lane, n, seed, row, samples, stream, ROWS, SAMPLES, BLOCK, ORDER, FAST)
        if VARIANCE != 0:
            z = z * sigma
        total += c_z * z
    if extra is not None:
        if c_e != 0:
            total += c_e * e
        if c_v != 0:
            if VARIANCE != 0:
                total += c_v * (sigma * sigma * e)
            else:
                total += c_v * e

    at = n * size + base + offsets
    if WRITTEN != 0:
        value0 = _combination(weights0, operands, BLOCK, 3 + SLOTS)
        value1 = _combination(weights1, operands, BLOCK, 3 + SLOTS)
        for k in tl.static_range(SLOTS):
            if (WRITTEN >> k) & 1 != 0:
                value = tl.where(target0 == k, value0, value1)
                tl.store(slots[k] + at, value, inside_if(inside, (target0 == k) | (target1 == k)))
    tl.store(out + at, total, inside)
    if x_in is not None:
        tl.store(x_in + at, total * tl.load(c + _S).to(tl.float32), inside)


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
    draws: TorchDraws | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`draws`: where torch's own generator stands, whose numbers are then made; one row for all, no noise, no seed."""
    check_values("row", row, table.shape[0])
    to = places(x, slots, out, slots_out, (x, model_output, extra, noise), empty_like_layout)
    x_in = empty_like_layout(x) if scales_input else x.new_empty(0)
    channels_last = sample_shape(x)[3]
    generates = seed is not None and samples is not None
    mean = model_output[:, : x.shape[1]] if variance else model_output
    var = model_output[model_output.shape[0] - x.shape[0] :, x.shape[1] :] if variance else None
    arguments = mean_arguments(mean, guidance_scale, guidance_rescale, channels_last)
    for name, value in {"x": x, "var": var, "extra": extra, "noise": noise}.items():
        operand = arguments[name] = float32_dense(value, channels_last)
        arguments[f"{name}_stride"] = 0 if operand is None else operand.stride(0)
    history = tuple(sample_dense(slot, channels_last) for slot in to.slots)
    chosen = choose(x, len(history))
    tiles = tiling(x, generates, chosen) if draws is None else torch_tiling(x, draws, chosen)
    launch.launch(
        solver_step_kernel,
        tiles.programs,
        x.device,
        num_warps=tiles.num_warps,
        repeatable=False,  # x' may lie over x, slots over themselves
        **arguments,
        slots=history,
        slot_strides=tuple(slot.stride(0) for slot in history),
        out=to.result,
        x_in=x_in if scales_input else None,
        table=table,
        num_rows=table.shape[0],
        writes=writes,
        row=row.contiguous(),
        threshold=None if threshold is None else threshold.contiguous(),
        clip_low=clip[0] if clip else 0.0,
        clip_high=clip[1] if clip else 0.0,
        seed=draws.seed if draws is not None else seed if generates else None,
        call=None if draws is None else draws.call,
        samples=samples.contiguous() if samples is not None and generates else None,
        stream=stream,
        **tiles.arguments,
        ROWS=row.dim() > 0,
        CLIPS=clip is not None,
        VARIANCE=variance,
        NOISE=(_GENERATED if generates or draws is not None else _NO_NOISE if noise is None else _GIVEN).value,
        FAST=x.dtype != torch.float32,
        SAMPLES=samples is not None and samples.dim() > 0,
        SLOTS=len(history),
        WRITTEN=sum(1 << k for k, target in enumerate(to.targets) if target is not None),
    )
    result, new_slots = to.finish()
    return result, x_in, new_slots


def solver_step_unsupported(x: Tensor, *rest: object) -> str | None:
    slots = rest[4]
    if isinstance(slots, Tensor | Sequence) and len(slots) > MOST_SLOTS:
        return f"the kernel holds {MOST_SLOTS} slots, the program has {len(slots)}"
    return launch.unsupported(x)
