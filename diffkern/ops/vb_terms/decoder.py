"""The discretised Gaussian decoder: −log of the probability of a pixel's grey level, and its derivatives.

A pixel is one of `levels` values in [−1, 1]; level x0 has the bin [x0 − h, x0 + h], h = 1/(levels − 1), and the end
bins reach to infinity (Ho et al. 2020, arXiv 2006.11239, eq. 13). With z± = (x0 − μ ± h)/σ its probability is
Φ(z+) − Φ(z−).

Two functions for Φ: "exact", in float64 and log space, right into the tails; "tanh", the approximation
½(1 + tanh(√(2/π)(z + 0.044715·z³))) that OpenAI's code uses, with a probability of at least 1e-12.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DECODERS = ("tanh", "exact")
LEAST = math.log(1e-12)
CUBIC = 0.044715
SLOPE = 2 * math.sqrt(2 / math.pi)  # ½(1 + tanh(u)) is the logistic function of 2u
LARGEST_INVERSE, LARGEST_Z = 1e11, 1e12  # of σ, and of z: beyond them nothing changes but what overflows


class Bin(NamedTuple):
    """−log probability per element, and its derivatives by x0 − μ and by log σ²."""

    value: Tensor
    of_difference: Tensor
    of_log_var: Tensor


def half_bin(levels: int) -> float:
    """h, half a bin's width."""
    return 1 / (levels - 1)


def end_of(levels: int) -> float:
    """|x0| beyond which a value belongs to an end bin: half a bin from the end, but 0.999 for up to 1,001 levels."""
    return max(0.999, 1 - half_bin(levels))


def decode(difference: Tensor, log_var: Tensor, x0: Tensor, levels: int, decoder: str) -> Bin:
    """The bins of x0, for a Gaussian whose mean is off by `difference` = x0 − μ; shapes broadcast.

    Results have difference's dtype; "exact" computes in float64.
    """
    ends = x0.double() < -end_of(levels), x0.double() > end_of(levels)
    if decoder == "tanh":
        return _tanh(difference, log_var, ends, half_bin(levels))
    found = _exact(difference.double(), log_var.double(), ends, half_bin(levels))
    return Bin(*(part.to(difference.dtype) for part in found))


def _tanh(difference: Tensor, log_var: Tensor, ends: tuple[Tensor, Tensor], half: float) -> Bin:
    inverse = torch.exp(-log_var / 2).clamp(max=LARGEST_INVERSE)
    upper, lower = (((difference + edge) * inverse).clamp(-LARGEST_Z, LARGEST_Z) for edge in (half, -half))
    width = 2 * half * inverse  # z+ − z−, and what follows from it, without taking a difference
    squares = upper * upper + upper * lower + lower * lower
    p, q = (SLOPE * (z + CUBIC * z * z * z) for z in (upper, lower))
    apart = SLOPE * width * (1 + CUBIC * squares)  # p − q
    # σ(p) − σ(q) = σ(p)·σ(−q)·(1 − e^−(p−q))
    below, above = torch.nn.functional.logsigmoid(p), torch.nn.functional.logsigmoid(-q)
    log_probability = below + above + _log_one_minus_exp(-apart)
    of_p, of_q = torch.sigmoid(-p), torch.sigmoid(q)
    slope_p, slope_q = (SLOPE * (1 + 3 * CUBIC * z * z) for z in (upper, lower))
    remainder = 1 / torch.expm1(apart)
    by_mean = slope_p * of_p - slope_q * of_q + 3 * SLOPE * CUBIC * width * (upper + lower) * remainder
    by_scale = upper * slope_p * of_p - lower * slope_q * of_q + SLOPE * width * (1 + 3 * CUBIC * squares) * remainder
    first, last = ends
    log_probability = torch.where(first, below, torch.where(last, above, log_probability))
    by_mean = torch.where(first, slope_p * of_p, torch.where(last, -slope_q * of_q, by_mean))
    by_scale = torch.where(first, upper * slope_p * of_p, torch.where(last, -lower * slope_q * of_q, by_scale))
    clamped = log_probability < LEAST
    return Bin(
        torch.where(clamped, -LEAST, -log_probability),
        torch.where(clamped, 0.0, -inverse * by_mean),
        torch.where(clamped, 0.0, by_scale / 2),
    )


def _exact(difference: Tensor, log_var: Tensor, ends: tuple[Tensor, Tensor], half: float) -> Bin:
    inverse = torch.exp(-log_var / 2)
    upper, lower = (difference + half) * inverse, (difference - half) * inverse
    first, last = ends
    # Φ(b) − Φ(a) on the side where both are small.
    flipped = upper + lower > 0
    b, a = torch.where(flipped, -lower, upper), torch.where(flipped, -upper, lower)
    log_b, log_a = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    log_probability = log_b + _log_one_minus_exp(log_a - log_b)
    log_probability = torch.where(
        first,
        torch.special.log_ndtr(upper),
        torch.where(last, torch.special.log_ndtr(-lower), log_probability),
    )

    def density(z: Tensor, none: Tensor) -> Tensor:
        """φ(z) over the probability, 0 where the bin reaches to infinity."""
        ratio = torch.exp(-z * z / 2 - math.log(2 * math.pi) / 2 - log_probability)
        return torch.where(none, 0.0, ratio)

    of_upper, of_lower = density(upper, last), density(lower, first)
    # z·φ(z) is 0, not ∞·0, where z is infinite.
    by_scale = torch.where(of_upper == 0, 0.0, upper * of_upper) - torch.where(of_lower == 0, 0.0, lower * of_lower)
    wide = Bin(-log_probability, inverse * (of_lower - of_upper), by_scale / 2)
    # In a narrow bin the difference cancels: φ(c)·w·(1 + (c² − 1)·w²/24 + …), the next term being below 1e-15.
    c, w = difference * inverse, 2 * half * inverse
    q = (c * c - 1) * w * w / 24
    rest = w * w / 12 / (1 + q)
    narrow = Bin(
        (c * c + math.log(2 * math.pi) + log_var) / 2 - math.log(2 * half) - torch.log1p(q),
        inverse * c * (1 - rest),
        (1 - c * c + (2 * c * c - 1) * rest) / 2,
    )
    is_narrow = (w * (1 + c.abs()) < 1e-3) & ~first & ~last
    return Bin(*(torch.where(is_narrow, a, b) for a, b in zip(narrow, wide, strict=True)))


def _log_one_minus_exp(u: Tensor) -> Tensor:
    """ln(1 − e^u) for u < 0, in the form that keeps its digits."""
    return torch.where(u < -math.log(2), torch.log1p(-torch.exp(u)), torch.log(-torch.expm1(u)))
