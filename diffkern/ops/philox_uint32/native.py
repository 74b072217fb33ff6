"""philox_uint32 through csrc/cpu/philox_uint32.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import sample_shape
from diffkern.ops._native import counter_source, cpu_only, num_threads


def philox_uint32(shape: Sequence[int], seed: Tensor, draw: Tensor, samples: Tensor, stream: int) -> Tensor:
    out = torch.empty(shape, dtype=torch.int64)
    if out.numel() == 0:
        return out
    samples = samples.contiguous()
    native_module().philox_uint32(
        shape=sample_shape(out),
        source=counter_source(seed, draw, samples, stream),
        out=out.data_ptr(),
        num_threads=num_threads(out.numel()),
    )
    return out


def philox_uint32_unsupported(shape: Sequence[int], seed: Tensor, *rest: object) -> str | None:
    return cpu_only(seed)
