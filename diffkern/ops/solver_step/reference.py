"""solver_step as the equations read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.ops._indices import check_values, per_sample
from diffkern.ops._layout import dense, in_layout_of
from diffkern.ops._terms import (
    Coefficients,
    compute_dtype,
    guided_mean,
    learned_sigma,
    term,
    threshold_or_one,
)
from diffkern.ops.philox_normal.reference import normals


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
    compute = compute_dtype(x)
    check_values("row", row, table.shape[0])
    like = dense(x)
    c = Coefficients(table, row, x)
    state = x.to(compute)
    history = [] if slots is None else [h.to(compute) for h in slots]
    m = guided_mean(x, model_output, guidance_scale, guidance_rescale).m

    x0 = term(c.a_x, state) + term(c.a_m, m)
    if clip is not None:
        s = threshold_or_one(threshold, x)
        x0 = torch.maximum(torch.minimum(x0, clip[1] * s), clip[0] * s) / s

    def combine(of_x: Tensor, of_m: Tensor, of_x0: Tensor, of_history: list[Tensor]) -> Tensor:
        total = term(of_x, state) + term(of_m, m) + term(of_x0, x0)
        for coefficient, h in zip(of_history, history, strict=True):
            total = total + term(coefficient, h)
        return total

    sigma = learned_sigma(x, model_output, c, variance)
    x_next = combine(c.c_x, c.c_m, c.c_0, c.history)
    if noise is None and seed is not None:
        assert samples is not None
        noise = normals(x.shape, seed, row, samples, stream)
    if noise is not None:
        z = noise.to(compute)
        x_next = x_next + term(c.c_z, z if sigma is None else z * sigma)
    if extra is not None:
        e = extra.to(compute)
        x_next = x_next + term(c.c_e, e) + term(c.c_v, e if sigma is None else sigma.square() * e)

    new_slots = x.new_empty(0)
    if slots is not None:
        new_slots = torch.stack(history).to(x.dtype)
        for block, target in zip(
            c.written, writes.index_select(0, row.reshape(-1)).reshape(*row.shape, 2).unbind(-1), strict=True
        ):
            written = combine(block[0], block[1], block[2], block[3:]).to(x.dtype)
            for k in range(len(history)):
                new_slots[k] = torch.where(per_sample(target, x) == k, written, new_slots[k])
    if slots_out is not None:
        for place, value in zip(slots_out, new_slots, strict=True):
            if place is not None:
                place.copy_(value)
    x_in = in_layout_of((x_next * c.s).to(x.dtype), like) if scales_input else x.new_empty(0)
    result = in_layout_of(x_next.to(x.dtype), like)
    return (result if out is None else out.copy_(result)), x_in, new_slots


def solver_step_unsupported(*args: object) -> None:
    return None
