"""The pieces of a step's equations that its reference, its backward pass and its per-sample scales share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffkern.ops._indices import gather, per_sample

FIXED = ("a_x", "a_m", "c_x", "c_m", "c_0", "c_z", "c_e", "c_v", "s", "log_var_min", "log_var_max")


class Coefficients:
    """The coefficients of every sample's row, each broadcastable over (N, C, …), in the arithmetic's dtype."""

    def __init__(self, table: Tensor, row: Tensor, like: Tensor) -> None:
        rows = gather(table, row).to(compute_dtype(like))
        columns = [per_sample(column, like) for column in rows.unbind(-1)]
        for name, column in zip(FIXED, columns, strict=False):
            setattr(self, name, column)
        num_slots = (len(columns) - len(FIXED) - 6) // 3
        first, width = len(FIXED), 3 + num_slots
        self.history = columns[first : first + num_slots]
        start = first + num_slots
        self.written = [columns[start : start + width], columns[start + width : start + 2 * width]]

    a_x: Tensor
    a_m: Tensor
    c_x: Tensor
    c_m: Tensor
    c_0: Tensor
    c_z: Tensor
    c_e: Tensor
    c_v: Tensor
    s: Tensor
    log_var_min: Tensor
    log_var_max: Tensor


class Mean(NamedTuple):
    """The network's mean: u and c of the equations, r_n, and m itself."""

    uncond: Tensor
    cond: Tensor | None
    rescale: Tensor | None
    unscaled: Tensor
    m: Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def term(coefficient: Tensor, operand: Tensor) -> Tensor:
    """coefficient·operand, and 0 where the coefficient is 0 whatever the operand is."""
    return torch.where(coefficient == 0, 0.0, coefficient * operand)


def threshold_or_one(threshold: Tensor | None, x: Tensor) -> Tensor:
    """s_n, broadcastable over (N, C, …)."""
    if threshold is None:
        return torch.ones((), dtype=compute_dtype(x), device=x.device)
    return per_sample(threshold.to(compute_dtype(x)), x)


def guided_mean(x: Tensor, model_output: Tensor, guidance_scale: Tensor | None, rescale: Tensor | None) -> Mean:
    """m = r_n·(u + w·(c − u)), on the mean's channels."""
    output = model_output.to(compute_dtype(x))
    mean = output[:, : x.shape[1]] if x.dim() > 1 else output
    if guidance_scale is None:
        return Mean(mean, None, None, mean, mean)
    uncond, cond = mean[: x.shape[0]], mean[x.shape[0] :]
    m = uncond + per_sample(guidance_scale.to(mean.dtype), x) * (cond - uncond)
    if rescale is None:
        return Mean(uncond, cond, None, m, m)
    return Mean(uncond, cond, rescale, m, per_sample(rescale.to(m.dtype), x) * m)


def learned_sigma(x: Tensor, model_output: Tensor, c: Coefficients, variance: int) -> Tensor | None:
    """σ per element from the variance half (cond's under guidance); None where the variance is fixed."""
    if variance == 0:
        return None
    log_variance = model_output[model_output.shape[0] - x.shape[0] :, x.shape[1] :].to(compute_dtype(x))
    if variance == 2:
        fraction = (log_variance + 1) / 2
        log_variance = fraction * c.log_var_max + (1 - fraction) * c.log_var_min
    return torch.exp(log_variance / 2)
