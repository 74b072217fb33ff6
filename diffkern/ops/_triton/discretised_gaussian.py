"""−ln of the probability that a Gaussian gives a pixel's grey level, with its derivatives by d = x0 − μ and by ln σ².

Of the bin [x0 − h, x0 + h], or from an end bin to infinity (Ho et al. 2020, arXiv 2006.11239, eq. 13); in units of σ
the bin is [z−, z+]. The forms are those of csrc/cpu/discretised_gaussian.h; NaN stays.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import fma
from diffkern.ops._triton.exponentials import log1p_positive, one_minus_exp, vanishing_exp

SLOPE = tl.constexpr(1.59576912)  # 2√(2/π)
CUBIC = tl.constexpr(0.044715)
LEAST = tl.constexpr(-27.6310211)  # ln 1e-12


@triton.jit
def decode_tanh(d, log_var, x0, half, end):
    """With the CDF 1/(1 + e^−p), p = 2√(2/π)·(z + 0.044715·z³), and a probability of 1e-12 at least.

    The probability is s(p)·s(−q)·(1 − e^−(p−q)) for the logistic function s, and p − q is had from z+ − z− = 2h/σ, so
    that nothing cancels. 1/σ and z are bounded where all has long reached its limit, so that no product overflows. In
    what the value is made of each fused product is said: it has the same bits with and without the derivatives used.
    """
    inverse = tl.minimum(tl.exp(-0.5 * log_var), 1e11)
    upper = tl.minimum(tl.maximum((d + half) * inverse, -1e12), 1e12)
    lower = tl.minimum(tl.maximum((d - half) * inverse, -1e12), 1e12)
    width = (2.0 * half) * inverse
    squares = fma(upper, upper, fma(upper, lower, lower * lower))
    p = SLOPE * fma(upper * upper, CUBIC * upper, upper)
    q = SLOPE * fma(lower * lower, CUBIC * lower, lower)
    apart = SLOPE * width * fma(squares, CUBIC, 1.0)
    # e^−|p| and e^−|q|, and of them s(−p), s(q) and, up to a factor of 1 or e^p, s(p) and s(−q).
    e_p, e_q = vanishing_exp(tl.abs(p)), vanishing_exp(tl.abs(q))
    e_apart = vanishing_exp(apart)
    within = one_minus_exp(apart, e_apart)
    first, last = x0 < -end, x0 > end
    # 1/((1 + e_p)(1 + e_q)/within) as 1/(1 + odds), which keeps the digits of a value near 0.
    between = (fma(e_p, e_q, e_p + e_q) + e_apart) / within
    odds = tl.where(first, e_p, tl.where(last, e_q, between))
    ln_p, ln_q = tl.minimum(p, 0.0), tl.minimum(-q, 0.0)
    exponent = tl.where(first, ln_p, tl.where(last, ln_q, ln_p + ln_q))
    log_probability = exponent - log1p_positive(odds)

    of_p = SLOPE * (1.0 + (3.0 * CUBIC) * (upper * upper)) * tl.where(p > 0.0, e_p, 1.0) / (1.0 + e_p)
    of_q = SLOPE * (1.0 + (3.0 * CUBIC) * (lower * lower)) * tl.where(q < 0.0, e_q, 1.0) / (1.0 + e_q)
    remainder = e_apart / within  # 1/(e^(p−q) − 1)
    by_mean = of_p - of_q + (3.0 * SLOPE * CUBIC) * width * (upper + lower) * remainder
    by_mean = tl.where(first, of_p, tl.where(last, -of_q, by_mean))
    by_scale = upper * of_p - lower * of_q + SLOPE * width * (1.0 + (3.0 * CUBIC) * squares) * remainder
    by_scale = tl.where(first, upper * of_p, tl.where(last, -lower * of_q, by_scale))

    # Bounds and exponentials may turn a NaN into a number.
    nan = tl.where(d == d, 0.0, float("nan")) + tl.where(log_var == log_var, 0.0, float("nan"))
    clamped = log_probability < LEAST
    value = tl.where(clamped, -LEAST, -log_probability) + nan
    of_difference = tl.where(clamped, 0.0, -inverse * by_mean) + nan
    of_log_var = tl.where(clamped, 0.0, 0.5 * by_scale) + nan
    return value, of_difference, of_log_var
