"""What the bound's terms need of each timestep: seven numbers, made of a process's tables.

With y = ε or x_t, the target is m̂ = of_y·y + of_x0·x0, and whatever the network predicts, its x0 is off by

    x0 − x̂0 = x0_scale·(m − m̂),

from which the means of posterior and model differ by coef1 times as much. The model's log-variance is
log β̃_t + delta_bias + delta_slope·v for the output v of its variance channels: for a fixed variance the slope is 0.
Derivation: docs/vb_terms.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffkern.ops._noise import capturing
from diffkern.ops._registry import in_plain_eager_mode

if TYPE_CHECKING:
    from diffkern.process.gaussian import ProcessTables

TARGETS = ("eps", "x0", "v", "x_prev", "flow")
VARIANCES = ("fixed", "fixed_small", "fixed_large", "learned", "learned_range")
COLUMNS = ("of_y", "of_x0", "x0_scale", "coef1", "log_var", "delta_bias", "delta_slope")


def coefficients(tables: ProcessTables, target: str, variance: str, y: str) -> Tensor:
    """The table (T, 7) of COLUMNS, float64; y is "noise" or "x_t". Differentiable in the tables.

    Kept for the tables that it was last made of, so that a loss in a loop does not make it anew.
    """
    tensors = [table for table in tables if isinstance(table, Tensor)]
    if (
        in_plain_eager_mode()
        and not any(table.requires_grad or table.is_inference() for table in tensors)
        and not capturing(tensors[0].device)
    ):
        identity = tuple((id(table), table._version) for table in tensors)
        return _kept(_Request(identity, target, variance, y, tables))
    return _made(tables, target, variance, y)


@dataclass(frozen=True)
class _Request:
    """Equal for the same tensors with the same contents; it holds them, so that no other can take their place."""

    identity: tuple[tuple[int, int], ...]
    target: str
    variance: str
    y: str
    tables: ProcessTables = field(compare=False)


@functools.lru_cache(maxsize=16)
def _kept(request: _Request) -> Tensor:
    # Never handed out, so nobody can write to it; not an inference tensor, so autograd may save it.
    with torch.inference_mode(False):
        return _made(request.tables, request.target, request.variance, request.y)


def _made(tables: ProcessTables, target: str, variance: str, y: str) -> Tensor:
    s, sigma = tables.sqrt_alphas_cumprod.double(), tables.sqrt_one_minus_alphas_cumprod.double()
    coef1, coef2, log_var, log_betas = (
        getattr(tables, name).double()
        for name in ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped", "log_betas")
    )
    of_y, of_x0 = target_coefficients(tables, target)
    if y == "x_t":  # y = s·x0 + σ·ε, solved for ε
        of_y, of_x0 = of_y / sigma, of_x0 - of_y * s / sigma
        if target == "x_prev":
            of_y, of_x0 = coef2, coef1
    one = torch.ones_like(s)
    x0_scale = {"eps": sigma / s, "x0": -one, "v": sigma, "x_prev": -1 / coef1, "flow": sigma / (s + sigma)}[target]
    if variance == "learned_range":
        bias = slope = (log_betas - log_var) / 2
    elif variance == "learned":
        bias, slope = -log_var, one
    else:
        bias, slope = fixed_log_variance(tables, variance).double() - log_var, torch.zeros_like(s)
    return torch.stack([of_y, of_x0, x0_scale, coef1, log_var, bias, slope], dim=1)


def target_coefficients(tables: ProcessTables, target: str) -> tuple[Tensor, Tensor]:
    """(a, b), float64 (T,) each, with the target a·ε + b·x0."""
    s, sigma = tables.sqrt_alphas_cumprod.double(), tables.sqrt_one_minus_alphas_cumprod.double()
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    match target:
        case "eps":
            return one, zero
        case "x0":
            return zero, one
        case "v":
            return s, -sigma
        case "flow":
            return one, -one
    assert tables.posterior_mean_coef1 is not None and tables.posterior_mean_coef2 is not None
    coef1, coef2 = tables.posterior_mean_coef1.double(), tables.posterior_mean_coef2.double()
    return coef2 * sigma, coef1 + coef2 * s


def fixed_log_variance(tables: ProcessTables, variance: str) -> Tensor:
    """log σ_t² (T,) of the fixed variance called so; β̃_0 = 0 counts as β̃_1."""
    small, log_betas = tables.posterior_log_variance_clipped, tables.log_betas
    assert small is not None and log_betas is not None
    if variance == "fixed_small":
        return small
    if variance == "fixed_large":
        return torch.cat([small[:1], log_betas[1:]])
    assert tables.log_variance is not None
    return tables.log_variance
