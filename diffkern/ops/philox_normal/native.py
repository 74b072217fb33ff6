"""philox_normal through csrc/cpu/philox_normal.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import sample_dense, sample_shape
from diffkern.ops._native import about_to_write, counter_source, cpu_only, num_threads, operand
from diffkern.ops.philox_normal.op import empty_normals


def philox_normal(
    shape: Sequence[int],
    seed: Tensor,
    draw: Tensor,
    samples: Tensor,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    out = empty_normals(shape, seed, dtype, channels_last)
    if out.numel() == 0:
        return out
    about_to_write(out)
    sizes = sample_shape(out)
    samples = samples.contiguous()
    native_module().philox_normal(
        shape=sizes,
        source=counter_source(seed, draw, samples, stream),
        out=operand(sample_dense(out, sizes[3])),
        num_threads=num_threads(out.numel()),
    )
    return out


def philox_normal_unsupported(shape: Sequence[int], seed: Tensor, *rest: object) -> str | None:
    return cpu_only(seed)
