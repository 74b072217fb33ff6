"""The integers behind the noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.ops._registry import Op
from diffkern.ops.philox_normal.op import checked_shape, resolve_counters


def philox_uint32(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    draw: int | Tensor = 0,
    samples: int | Tensor = 0,
    stream: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The Philox4x32-10 words from which `philox_normal` of the same arguments makes its normals.

    Returns int64 of `shape` with values in [0, 2^32), contiguous: element i of a sample is word i mod 4 of the counter
    (i div 4, draw, sample mod 2^32, (sample div 2^32)·2^16 + stream) under the key `seed`. Equal on every backend and
    device. Arguments and errors are those of `philox_normal`.
    """
    shape = checked_shape(shape)
    return OP(shape, *resolve_counters(shape, seed, draw, samples, stream, device), stream)


def _fake(shape: Sequence[int], seed: Tensor, draw: Tensor, samples: Tensor, stream: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=seed.device)


OP = Op(
    "philox_uint32(SymInt[] shape, Tensor seed, Tensor draw, Tensor samples, int stream) -> Tensor",
    package=__package__,
    fake=_fake,
)
