"""Normals from Philox's words: Box–Muller on integers, as in csrc/cpu/normal.h.

u = (g + ½)·2⁻³², z = √(−2 ln u1)·(cos, sin)(2π·u2). float32 stays within 4 ulp of the exact function of the integers
because nothing is rounded before it has to be: above u1 = ½ the logarithm is taken of the integer complement, next to 1
as that of 1 − complement; the quadrant of the angle is taken from the integer, and what remains is converted once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.arithmetic import fast_cos, fast_log2, fast_sin, fast_square_root, fma, square_root


@triton.jit
def _plus_half(g):
    """float32(g) + ½ of uint32 g, rounded once."""
    return fma((g >> 16).to(tl.float32), 65536.0, (g & 0xFFFF).to(tl.float32) + 0.5)


@triton.jit
def log_of(f, e):
    """ln(1 + f) + e·ln 2 for f in [√½ − 1, √2 − 1] and whole e."""
    p = fma(f, 0.07122081, -0.11581538)
    p = fma(p, f, 0.11677974)
    p = fma(p, f, -0.12410096)
    p = fma(p, f, 0.14247764)
    p = fma(p, f, -0.16668487)
    p = fma(p, f, 0.20000803)
    p = fma(p, f, -0.24999989)
    p = fma(p, f, 0.3333333)
    square = f * f
    tail = fma(e, -2.12194440e-4, f * square * p)
    tail = fma(square, -0.5, tail)
    return fma(e, 0.693359375, f + tail)


@triton.jit
def radius(g):
    """√(−2 ln u) for u = (g + ½)·2⁻³²."""
    upper = g >= 0x80000000
    near_one = g > 0xB504F333
    scaled = _plus_half(tl.where(upper, 0xFFFFFFFF - g, g)) * 2.3283064365386963e-10
    bits = scaled.to(tl.uint32, bitcast=True) - 0x3F3504F3
    e_lower = (bits.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    f_lower = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(near_one, -scaled, tl.where(upper, fma(scaled, -2.0, 1.0), f_lower))
    e = tl.where(near_one, 0.0, tl.where(upper, -1.0, e_lower))
    return square_root(-2.0 * log_of(f, e))


@triton.jit
def fast_pair(g0, g1):
    """Two normals for results of 16 bits, each off by some 1e-6, from a third of the instructions.

    The approximate logarithm is off by 2⁻²² however small it is, so next to 1 its series takes its place. Angles are
    in [−π, π), where sine and cosine are off by 2⁻²⁰ at most.
    """
    near_one = g0 >= 0xF8000000
    scaled = fma(tl.where(near_one, 0xFFFFFFFF - g0, g0).to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    series = scaled * (2.0 + scaled * (1.0 + scaled * (0.6666667 + scaled * 0.5)))
    r = fast_square_root(tl.where(near_one, series, -1.3862943611198906 * fast_log2(scaled)))
    angle = g1.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    return r * fast_cos(angle), r * fast_sin(angle)


@triton.jit
def cos_sin(g):
    """cos and sin of 2π·(g + ½)·2⁻³²."""
    shifted = g + 0x20000000
    quadrant = shifted >> 30
    # 2r + 1 for the remainder r in [−2²⁹, 2²⁹): the half is in the integer, the conversion rounds once.
    odd = (((shifted & 0x3FFFFFFF) - 0x20000000) * 2 + 1).to(tl.int32, bitcast=True)
    z = odd.to(tl.float32) * 9.31322574615478515625e-10  # the angle is π/4·z, z in [−1, 1]
    w = z * z
    s = fma(w, 3.09882983e-7, -3.65740524e-5)
    s = fma(s, w, 2.49039415e-3)
    s = fma(s, w, -8.07455122e-2)
    c = fma(w, 3.49545111e-6, -3.25934981e-4)
    c = fma(c, w, 1.58543771e-2)
    c = fma(c, w, -3.08425158e-1)
    # The leading coefficient of the sine in two parts, so that its own rounding does not count.
    sine = fma(z, 0.785398185253143310546875, z * fma(s, w, -2.18556929e-8))
    cosine = fma(c, w, 1.0)
    swap = (quadrant & 1) != 0
    cos_sign = ((quadrant + 1) & 2) << 30
    sin_sign = (quadrant & 2) << 30
    of_cos = tl.where(swap, sine, cosine).to(tl.uint32, bitcast=True) ^ cos_sign
    of_sin = tl.where(swap, cosine, sine).to(tl.uint32, bitcast=True) ^ sin_sign
    return of_cos.to(tl.float32, bitcast=True), of_sin.to(tl.float32, bitcast=True)


@triton.jit
def pair(g0, g1, FAST: tl.constexpr):
    """Two float32 normals of two words; with FAST as `fast_pair` has them."""
    if FAST:
        return fast_pair(g0, g1)
    r = radius(g0)
    c, s = cos_sin(g1)
    return r * c, r * s


@triton.jit
def torch_pair(g0, g1):
    """The two normals that torch makes of two words on a GPU, by cuRAND's formula in float32; the sine comes first."""
    u = fma(g0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    v = fma(g1.to(tl.float32), 1.4629180792671596e-09, 7.314590396335798e-10)
    r = tl.sqrt(-2.0 * tl.log(u))
    return r * fast_sin(v), r * fast_cos(v)
