"""Which backend a call of attention takes: ours, or torch's own where that is faster."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OURS = ("native", "triton", "sdpa", "reference")
TORCHS = ("sdpa", "native", "triton", "reference")


class Faster(NamedTuple):
    """A region where scaled_dot_product_attention with its copies takes less time."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    head_channels: range
    scores: int  # of a head, T·K, from which on

    def holds(self, q: Tensor, head_channels: int, scores: int) -> bool:
        return (
            q.device.type == self.device
            and q.dtype in self.dtypes
            and head_channels in self.head_channels
            and scores >= self.scores
        )


# Predicted, not measured: docs/performance-notes.md. FlashAttention and cuDNN's kernels are for 16 bits and heads of
# up to 128 (256) channels; up to 256 keys their launches and the copies decide, beyond that their arithmetic does.
TABLE = (Faster("cuda", (torch.bfloat16, torch.float16), range(33, 129), 1024 * 1024),)


def preference(q: Tensor, head_channels: int, scores: int) -> tuple[str, ...]:
    """The backends in the order in which they are tried; with gradients SDPA is passed over (sdpa.py)."""
    return TORCHS if any(region.holds(q, head_channels, scores) for region in TABLE) else OURS
