"""Sinusoidal embeddings of time (Vaswani et al. 2017, §3.5; Ho et al. 2020, appendix B)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

EmbeddingOrder = Literal["cos_sin", "sin_cos"]


def sinusoidal_embedding(
    t: Tensor, dim: int, *, order: EmbeddingOrder = "cos_sin", freq_shift: int = 0, max_period: float = 10000.0
) -> Tensor:
    """cos(t·f_i) and sin(t·f_i), with f_i = max_period^(−i / (dim/2 − freq_shift)), i = 0 … dim/2 − 1.

    t: (N,), integer or floating, in steps. Returns float32 (N, dim), computed in float32 as all codebases in use do:
    weights trained there were trained on these very values.

    order: "cos_sin" (improved- and guided-diffusion, diffusers with ``flip_sin_to_cos``) or "sin_cos" (DDPM).
    freq_shift: 0, or 1 in DDPM.

    Raises ``ValueError`` for an unknown order, an odd ``dim``, or ``dim`` too small for the shift.
    """
    half = dim // 2
    if order not in get_args(EmbeddingOrder):
        raise ValueError(f"order must be one of {get_args(EmbeddingOrder)}, not {order!r}")
    if dim % 2 or half <= freq_shift:
        raise ValueError(f"dim must be even and above 2·freq_shift = {2 * freq_shift}, not {dim}")
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(exponents)
    parts = (angles.cos(), angles.sin()) if order == "cos_sin" else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)
