"""Exponentials and what is made of them where digits would be lost, as in csrc/cpu/vec.h: NaN stays."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import fma
from diffkern.ops._triton.normal import log_of


@triton.jit
def exp_of_scalar(x):
    """e^x as float32 of float64 x: in float32 an x of 40 would be off by 2e-6, and so would the result."""
    exponent = x * 1.4426950408889634
    high = exponent.to(tl.float32)
    low = (exponent - high.to(tl.float64)).to(tl.float32)
    return tl.exp2(high) * (1.0 + 0.6931472 * low)


@triton.jit
def exp2_of_minus(rate, rate_rest, v):
    """2^−((rate + rate_rest)·v) in float32: with what the product loses in rounding, as above."""
    product = rate * v
    lost = fma(rate_rest, v, fma(rate, v, -product))
    # An infinite v has no remainder.
    return tl.exp2(-product) * tl.where(lost == lost, fma(lost, -0.6931472, 1.0), 1.0)


@triton.jit
def exp_remainder(z, e):
    """(z + e − 1, its derivative 1 − e) for e = exp(−z): to a few 1e-7 of themselves or, beyond |z| = ½, of 1."""
    p = fma(z, -2.7557319e-6, 2.4801587e-5)
    p = fma(p, z, -1.9841270e-4)
    p = fma(p, z, 1.3888889e-3)
    p = fma(p, z, -8.3333333e-3)
    p = fma(p, z, 4.1666667e-2)
    p = fma(p, z, -1.6666667e-1)
    p = fma(p, z, 0.5)
    series = z * z * p
    small = tl.abs(z) < 0.5
    return tl.where(small, series, (z - 1.0) + e), tl.where(small, z - series, 1.0 - e)


@triton.jit
def vanishing_exp(z):
    """exp(−z) for z ≥ 0, and 0 beyond 87: it meets factors up to 1e36."""
    return tl.where(z > 87.0, 0.0, tl.exp(-z))


@triton.jit
def one_minus_exp(z, e):
    """1 − e for e = exp(−z), z ≥ 0, to a few 1e-7 of itself."""
    p = fma(z, -1.9841270e-4, 1.3888889e-3)
    p = fma(p, z, -8.3333333e-3)
    p = fma(p, z, 4.1666667e-2)
    p = fma(p, z, -1.6666667e-1)
    p = fma(p, z, 0.5)
    return tl.where(z < 0.4, fma(-(z * z), p, z), 1.0 - e)


@triton.jit
def log1p_positive(x):
    """ln(1 + x) for x ≥ 0, to a few 1e-7 of itself."""
    bits = (1.0 + x).to(tl.uint32, bitcast=True) - 0x3F3504F3  # 1 + x = 2^e·(1 + f)
    small = x < 0.4
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    e = (bits.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    return tl.where(x == x, log_of(tl.where(small, x, f), tl.where(small, 0.0, e)), x)
