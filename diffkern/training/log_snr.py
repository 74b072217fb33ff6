"""A noise schedule with weights: γ(u) = −log SNR, strictly rising on [0, 1], and the tables it becomes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffkern.process import GaussianProcess

# The ends keep at least this distance from the middle between the first ones, so that γ_0 < γ_1 whatever the weights.
_MARGIN = 0.5
# _UNITS sigmoids of slope _SHARPNESS stand evenly on [−_BEYOND, 1 + _BEYOND]: their equal-weighted sum is a straight
# line on [0, 1]. They make _SHARE of the rise at first and a linear term the rest, so that it can bend both ways.
_UNITS, _SHARPNESS, _BEYOND, _SHARE = 64, 24.0, 0.25, 0.8
# Where a network's time lies while the ends are the first ones: the range of the usual thousand timesteps.
_LAST_TIME = 999.0


class Rise(NamedTuple):
    """How far γ has come from γ_0 to γ_1: `height` in [0, 1], and its derivative `slope`, both of u's shape."""

    height: Tensor
    slope: Tensor


class LearnedLogSNR(nn.Module):
    """γ(u) = γ_0 + (γ_1 − γ_0)·(γ̃(u) − γ̃(0))/(γ̃(1) − γ̃(0)) for u in [0, 1], the logarithm of σ²/ᾱ: SNR = e^(−γ).

    γ̃(u) = u + Σ_j c_j·sigmoid(a_j·u + b_j) with a_j, c_j > 0 is the monotone network of Kingma et al. 2021 (arXiv
    2107.00630, appendix H) without the scale and shift that the division takes out again. ᾱ = sigmoid(−γ) and
    1 − ᾱ = sigmoid(γ). It starts nearly as the straight line from `gamma_0` to `gamma_1` (within 0.01 % of its rise),
    draws no random numbers, and rises strictly, with γ_0 < γ_1, whatever finite values its parameters take.

    The ends are trained apart from what lies between them (see ``learned_schedule``): they are the parameters `below`
    and `above`; `sharpness`, `shift` and `height`, (64,) each, are the interior's.

    A network is told `time(γ)`, an affine map that sends the first `gamma_0` to 0 and the first `gamma_1` to 999 and
    does not change afterwards; its two constants are in the state dict.

    All methods compute in the dtype of their argument, so that float64 gives tables.

    Raises ValueError unless gamma_1 − gamma_0 > 1, both finite.
    """

    middle: Tensor
    time_zero: Tensor
    time_per_gamma: Tensor

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 5.0) -> None:
        super().__init__()
        if not 2 * _MARGIN < gamma_1 - gamma_0 < math.inf:
            raise ValueError(f"gamma_0 and gamma_1 are {gamma_0} and {gamma_1}; gamma_1 must exceed gamma_0 by over 1")
        middle, reach = (gamma_0 + gamma_1) / 2, (gamma_1 - gamma_0) / 2
        self.register_buffer("middle", torch.tensor(middle, dtype=torch.float64))
        self.register_buffer("time_zero", torch.tensor(gamma_0, dtype=torch.float64))
        self.register_buffer("time_per_gamma", torch.tensor(_LAST_TIME / (gamma_1 - gamma_0), dtype=torch.float64))
        start = _inverse_softplus(torch.tensor(reach - _MARGIN, dtype=torch.float64))
        # float64, as what is made of them is: γ' stands for the difference of neighbouring timesteps.
        self.below, self.above = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        centres = torch.linspace(-_BEYOND, 1 + _BEYOND, _UNITS, dtype=torch.float64)
        slopes = torch.full_like(centres, _SHARPNESS)
        density = _UNITS / (1 + 2 * _BEYOND)  # units per u, each of which adds its height
        self.sharpness = nn.Parameter(_inverse_softplus(slopes))
        self.shift = nn.Parameter(-slopes * centres)
        self.height = nn.Parameter(_inverse_softplus(torch.full_like(centres, _SHARE / (1 - _SHARE) / density)))

    def ends(self) -> tuple[Tensor, Tensor]:
        """(γ_0, γ_1), float64 (), with gradient to the two parameters of the ends alone."""
        return (
            self.middle - _MARGIN - softplus(self.below, threshold=40.0),
            self.middle + _MARGIN + softplus(self.above, threshold=40.0),
        )

    def rise(self, u: Tensor) -> Rise:
        """Normalised height and slope at u (…) in [0, 1], exactly 0 and 1 at its ends; gradient to the interior alone.

        The slope is dγ/du / (γ_1 − γ_0), in closed form.
        """
        a, b, c = (weight.to(u.dtype) for weight in (softplus(self.sharpness), self.shift, softplus(self.height)))

        # u = 1 goes through the very sum that the others go through, so that its height is 1 to the bit.
        at = torch.cat([u.reshape(-1), u.new_ones(1)])[:, None]
        s = torch.sigmoid(a * at + b)
        climbed = at[:, 0] + ((s - torch.sigmoid(b)) * c).sum(1)
        steepness = 1 + (s * (1 - s) * (a * c)).sum(1)
        return Rise(*((values[:-1] / climbed[-1]).reshape(u.shape) for values in (climbed, steepness)))

    def forward(self, u: Tensor) -> Tensor:
        """γ(u), of u's shape and dtype, for u in [0, 1]."""
        first, last = self.ends()
        height = self.rise(u).height.double()
        return (first * (1 - height) + last * height).to(u.dtype)

    def slope(self, u: Tensor) -> Tensor:
        """γ'(u), of u's shape and dtype, for u in [0, 1]; positive."""
        first, last = self.ends()
        return ((last - first) * self.rise(u).slope.double()).to(u.dtype)

    def time(self, gamma: Tensor) -> Tensor:
        """What a network is told at the noise level γ: 0 at the first γ_0, 999 at the first γ_1, of γ's shape."""
        return (gamma - self.time_zero) * self.time_per_gamma

    @torch.no_grad()
    def process(self, num_timesteps: int, prediction: str = "eps", variance: str = "fixed_small") -> GaussianProcess:
        """The schedule as ordinary tables: ᾱ_t = sigmoid(−γ(t/(T−1))), and `time` of that γ as `timestep_map`.

        t = 0 is at γ_0 and t = T−1 at γ_1. β_t is made of differences of log ᾱ, in float64, so that it keeps its
        precision where ᾱ_t hardly changes.

        Raises ValueError for num_timesteps below 2, and for a prediction or variance that GaussianProcess refuses.
        """
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 2, the two ends of the schedule")
        gamma = self(torch.linspace(0, 1, num_timesteps, dtype=torch.float64, device=self.middle.device))
        log_alphas_cumprod = nn.functional.logsigmoid(-gamma).cpu().numpy()
        betas = -np.expm1(np.diff(log_alphas_cumprod, prepend=0.0))
        return GaussianProcess(betas, prediction, variance, self.time(gamma).cpu().numpy())


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))
