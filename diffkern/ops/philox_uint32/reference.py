"""philox_uint32 on int64 tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.ops.philox_normal.reference import philox_words


def philox_uint32(shape: Sequence[int], seed: Tensor, draw: Tensor, samples: Tensor, stream: int) -> Tensor:
    size = math.prod(shape[1:])
    if shape[0] == 0 or size == 0:
        return torch.empty(shape, dtype=torch.int64, device=seed.device)
    return philox_words(shape[0], size, seed, draw, samples, stream).reshape(shape).contiguous()


def philox_uint32_unsupported(*args: object) -> None:
    return None
