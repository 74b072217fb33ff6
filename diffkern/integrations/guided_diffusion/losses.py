"""KL divergence of two Gaussians and the log-likelihood of grey levels, in nats and per element."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF_BIN = 1.0 / 255  # of 256 grey levels in [−1, 1]
_FIRST, _LAST = -0.999, 0.999  # beyond these a value is in the end bins, which reach to infinity
_LOG_FLOOR = math.log(1e-12)

# Φ(z) is about ½·(1 + tanh(√(2/π)·(z + 0.044715·z³))) (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2), which is
# σ(slope·(z + cubic·z³)) with twice the slope.
_SLOPE, _CUBIC = 2.0 * math.sqrt(2.0 / math.pi), 0.044715

# Where σ and its logarithm's derivative have long reached their limits: in between nothing overflows, nor do gradients.
_MAX_Z = 30.0
_MAX_CENTRE = 1e6
_MIN_LOG_SCALE = -20.0
_MAX_LOGIT_WIDTH = 100.0


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)), elementwise, of tensors and numbers that broadcast.

    Raises TypeError unless one of them is a tensor.
    """
    like = next((value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor)), None)
    if like is None:
        raise TypeError("normal_kl takes at least one tensor, got numbers alone")
    logvar1, logvar2 = (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)
        for value in (logvar1, logvar2)
    )
    gap = logvar2 - logvar1
    return 0.5 * (gap + torch.expm1(-gap) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Φ(x) as ½·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the relative error of whose lower tail is that of a rounding."""
    return torch.sigmoid(_logit(x))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log P(x) under a Gaussian whose mass is collected in 256 bins around the grey levels in [−1, 1].

    x: (N, C, …), the levels; means and log_scales (log of the standard deviation): x's shape. Φ is that of
    `approx_standard_normal_cdf`; x below −0.999 or above 0.999 is in a bin that reaches to infinity; no P is below
    1e-12, and there the gradient is 0. Ho et al. 2020 (arXiv 2006.11239), eq. 13. Raises ValueError for other shapes.
    """
    for name, value in (("means", means), ("log_scales", log_scales)):
        if value.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be x's, {tuple(x.shape)}")
    inv_scale = torch.exp(-log_scales.clamp(min=_MIN_LOG_SCALE))
    centred = x - means
    upper, lower = (
        _logit((inv_scale * edge).clamp(-_MAX_Z, _MAX_Z)) for edge in (centred + _HALF_BIN, centred - _HALF_BIN)
    )
    below_upper, above_lower = F.logsigmoid(upper), F.logsigmoid(-lower)
    # σ(p) − σ(q) = σ(p)·σ(−q)·(1 − e^(q−p)), with p − q as a product: z₊² + z₊z₋ + z₋² = 3c² + h².
    centre, half = (inv_scale * centred).clamp(-_MAX_CENTRE, _MAX_CENTRE), inv_scale * _HALF_BIN
    width = 2.0 * _SLOPE * half * (1.0 + _CUBIC * (3.0 * centre**2 + half**2))
    width = width.clamp(torch.finfo(width.dtype).tiny, _MAX_LOGIT_WIDTH)
    inside = below_upper + above_lower + torch.log(-torch.expm1(-width))
    log_probability = torch.where(x < _FIRST, below_upper, torch.where(x > _LAST, above_lower, inside))
    return log_probability.clamp(min=_LOG_FLOOR)


def _logit(z: Tensor) -> Tensor:
    """log(P/(1 − P)) of P, the approximate Φ(z)."""
    return _SLOPE * (z + _CUBIC * z**3)
