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
# Of P in e^(x²)·erfc(x) = s·P(2s − 1), s = 4/(4 + x): interpolated at Chebyshev nodes, right to 1e-16 of itself for
# every x ≥ 0. The highest power first.
SCALED_ERFC = tl.constexpr(
    (
        3.130423070529455e-10,
        -6.617942512486173e-11,
        -3.880515697903128e-09,
        -2.0691219034054744e-10,
        3.077901855639743e-08,
        1.8994402187265254e-08,
        -2.1111037846283067e-07,
        -3.562393200959625e-07,
        1.1732609498291667e-06,
        4.715370444493941e-06,
        -9.086395093590862e-07,
        -4.420327118929924e-05,
        -0.00011376321237622333,
        7.023973429864022e-05,
        0.0015280139205288011,
        0.006592513332237486,
        0.019095378726752158,
        0.04350273431022892,
        0.08271289696952584,
        0.13521345782829913,
        0.19330217556630902,
        0.2441371822702206,
        0.27399891525012277,
    )
)
HALF_LN_2PI = tl.constexpr(0.9189385332046727)


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


@triton.jit
def log_normal_cdf(z):
    """ln Φ(z) for float64 z, to a few ulp right into both tails."""
    s = 4.0 / (4.0 + tl.abs(z) * 0.7071067811865476)
    p = tl.full(z.shape, SCALED_ERFC[0], tl.float64)
    for i in tl.static_range(1, 23):
        p = p * (2.0 * s - 1.0) + SCALED_ERFC[i]
    half_scaled, exponent = 0.5 * s * p, -0.5 * z * z
    return tl.where(z > 0.0, _log1p(-half_scaled * tl.exp(exponent)), exponent + tl.log(half_scaled))


@triton.jit
def _log1p(y):
    """ln(1 + y) for float64 y in (−1, 0]: what rounding 1 + y takes from y is given back in proportion."""
    w = 1.0 + y
    return tl.where(w == 1.0, y, tl.log(w) * y / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def _log_one_minus_exp(u):
    """ln(1 − e^u) for float64 u ≤ 0; e^u − 1 with the same remedy."""
    w = tl.exp(u)
    near = (w - 1.0) * u / tl.where(w == 1.0, 1.0, tl.log(w))
    return tl.where(u < -0.7, _log1p(-w), tl.log(-tl.where(w == 1.0, u, near)))


@triton.jit
def decode_exact(difference, log_variance, x0, levels, end):
    """With the exact CDF, in float64 and log space: a grey level far from the mean is the difference of two Φ that are
    equal in float32."""
    d, log_var = difference.to(tl.float64), tl.full(difference.shape, 0.0, tl.float64) + log_variance.to(tl.float64)
    h = 1.0 / (levels - 1).to(tl.float64)
    inverse = tl.exp(-0.5 * log_var)
    upper, lower = (d + h) * inverse, (d - h) * inverse
    first, last = x0 < -end, x0 > end
    # Φ(b) − Φ(a) on the side where both are small; an end bin has no a.
    flipped = upper + lower > 0.0
    b = tl.where(first, upper, tl.where(last, -lower, tl.where(flipped, -lower, upper)))
    log_b = log_normal_cdf(b)
    apart = log_normal_cdf(tl.where(flipped, -upper, lower)) - log_b
    log_probability = tl.where(first | last, log_b, log_b + _log_one_minus_exp(apart))
    of_upper = tl.where(last, 0.0, tl.exp(-0.5 * upper * upper - HALF_LN_2PI - log_probability))
    of_lower = tl.where(first, 0.0, tl.exp(-0.5 * lower * lower - HALF_LN_2PI - log_probability))
    # z·φ(z) is 0, not ∞·0, where z is infinite.
    by_scale = tl.where(of_upper == 0.0, 0.0, upper * of_upper) - tl.where(of_lower == 0.0, 0.0, lower * of_lower)
    # In a narrow bin the difference cancels: φ(c)·w·(1 + (c² − 1)·w²/24 + …), the next term being below 1e-15.
    c, w = d * inverse, 2.0 * h * inverse
    twelfth = w * w / 12.0
    q = 0.5 * (c * c - 1.0) * twelfth
    rest = twelfth / (1.0 + q)
    narrow = (w * (1.0 + tl.abs(c)) < 1e-3) & (first == 0) & (last == 0)
    of_narrow = 0.5 * c * c + HALF_LN_2PI + 0.5 * log_var - tl.log(2.0 * h) - q  # ln(1 + q), q below 1e-7
    value = tl.where(narrow, of_narrow, -log_probability)
    of_difference = inverse * tl.where(narrow, c * (1.0 - rest), of_lower - of_upper)
    of_log_var = 0.5 * tl.where(narrow, 1.0 - c * c + (2.0 * c * c - 1.0) * rest, by_scale)
    return value.to(tl.float32), of_difference.to(tl.float32), of_log_var.to(tl.float32)
