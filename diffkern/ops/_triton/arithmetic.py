"""Single instructions, and their twins for the interpreter, which rounds differently or knows no assembly."""

from __future__ import annotations

import triton
import triton.language as tl

from diffkern.ops._triton.launch import INTERPRETED

ON_DEVICE = tl.constexpr(not INTERPRETED)

# Four instructions for the thirteen of tl.exp and a division, which take care of subnormal numbers.
_SIGMOID = tl.constexpr(
    "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
    "rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def fma(a, b, c):
    """a·b + c for float32 a, numbers being float32 too, rounded once.

    The interpreter would round the product: there it is exact in float64.
    """
    if ON_DEVICE:
        return tl.fma(a, b, c)
    b, c = tl.cast(b, tl.float32).to(tl.float64), tl.cast(c, tl.float32).to(tl.float64)
    return (a.to(tl.float64) * b + c).to(tl.float32)


@triton.jit
def product(a, b):
    """a·b for float32 a and b, rounded: never part of a fused operation with what is done next."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    return a * b


@triton.jit
def square_root(x):
    """√x for normal x > 0 in float32, within 0.51 ulp: the device's reciprocal root and a step of Newton's."""
    if ON_DEVICE:
        y = tl.rsqrt(x)
        root = x * y
        return tl.fma(tl.fma(-root, root, x), 0.5 * y, root)
    return tl.sqrt(x)


@triton.jit
def fast_square_root(x):
    """√x within a few ulp."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.sqrt(x)


@triton.jit
def fast_log2(x):
    """log₂ x, off by 2⁻²² at most where |log₂ x| < 1, else by 2⁻²² of itself."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def fast_sin(x):
    """sin x for |x| < 2π, off by 2⁻²⁰ at most."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.sin(x)


@triton.jit
def fast_cos(x):
    """cos x for |x| < 2π, off by 2⁻²⁰ at most."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.cos(x)


@triton.jit
def sigmoid(z):
    """1/(1 + exp(−z)), within a few ulp; 0 where it is below 2⁻¹²⁶."""
    if ON_DEVICE:
        return tl.inline_asm_elementwise(_SIGMOID, "=f,f", [z], tl.float32, True, 1)
    return 1.0 / (1.0 + tl.exp(-z))
