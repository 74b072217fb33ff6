"""dynamic_threshold through csrc/cpu/dynamic_threshold.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import is_channels_last, sample_dense, sample_shape
from diffkern.ops._native import cpu_only, num_threads, operand
from diffkern.ops._terms import compute_dtype


def dynamic_threshold(
    x: Tensor,
    mean: Tensor,
    table: Tensor,
    row: Tensor,
    guidance_scale: Tensor | None,
    rescale: Tensor | None,
    ratio: float,
    largest: float,
) -> Tensor:
    samples, compute, channels_last = x.shape[0], compute_dtype(x), is_channels_last(x)
    data = sample_dense(x, channels_last)
    # Arithmetic in float64 takes float64 alone, and that in float32 none of it.
    mixed = (mean.dtype == torch.float64) != (compute == torch.float64)
    values = sample_dense(mean, channels_last, compute if mixed else None)
    cond = None if guidance_scale is None else operand(values[samples:])
    row = row.contiguous()
    scalars = [None if value is None else value.contiguous() for value in (guidance_scale, rescale)]
    addresses = [None if value is None else value.data_ptr() for value in scalars]
    module = native_module()
    num_tasks = min(num_threads(x.numel()), samples)
    scratch = x.new_empty(num_tasks * module.threshold_scratch(math.prod(x.shape[1:])), dtype=compute)
    threshold = x.new_empty(samples, dtype=torch.float64)
    module.dynamic_threshold(
        shape=sample_shape(x),
        x=operand(data),
        uncond=operand(values[:samples]),
        cond=cond,
        table=table.data_ptr(),
        num_rows=table.shape[0],
        num_columns=table.shape[1],
        row=row.data_ptr(),
        row_per_sample=row.dim() > 0,
        guidance_scale=addresses[0],
        guidance_per_sample=guidance_scale is not None and guidance_scale.dim() > 0,
        guidance_rescale=addresses[1],
        ratio=ratio,
        largest=largest,
        scratch=scratch.data_ptr(),
        threshold=threshold.data_ptr(),
        num_tasks=num_tasks,
    )
    return threshold


def dynamic_threshold_unsupported(x: Tensor, *rest: object) -> str | None:
    return cpu_only(x)
