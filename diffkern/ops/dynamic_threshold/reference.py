"""dynamic_threshold as the definition reads."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._indices import check_values
from diffkern.ops._layout import flat_samples
from diffkern.ops._terms import Coefficients, guided_mean, term


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
    check_values("row", row, table.shape[0])
    c = Coefficients(table, row, x)
    m = guided_mean(x, mean, guidance_scale, rescale).m
    x0 = flat_samples(term(c.a_x, x.to(m.dtype)) + term(c.a_m, m))
    if x0.shape[1] == 0:
        return torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    ordered = x0.abs().double().sort(dim=1).values
    position = ratio * (x0.shape[1] - 1)
    low = int(position)
    lower, upper = ordered[:, low], ordered[:, min(low + 1, x0.shape[1] - 1)]
    return torch.lerp(lower, upper, position - low).clamp(1.0, largest)


def dynamic_threshold_unsupported(*args: object) -> None:
    return None
