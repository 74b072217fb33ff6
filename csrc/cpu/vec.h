// Vectors written once: GCC/Clang vector extensions of sixteen lanes become AVX-512, of eight AVX2, of four SSE2 or
// whatever the machine has. Each kernel file is compiled once per instruction set,
// inside namespace diffkern::DIFFKERN_ISA; everything here lives in that namespace too, so that the linker can never
// pick an AVX2 copy of an inline function for the portable path.
#pragma once

#ifndef DIFFKERN_ISA
#error "compile with -DDIFFKERN_ISA=portable or -DDIFFKERN_ISA=avx2"
#endif

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define DIFFKERN_INLINE inline __attribute__((always_inline))

namespace diffkern {
namespace DIFFKERN_ISA {

// As many float32 lanes as a register has: the compilers take wider vectors apart lane by lane.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef double f64v __attribute__((vector_size(8 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef int64_t i64v __attribute__((vector_size(8 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint64_t u64v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));

}  // namespace DIFFKERN_ISA
}  // namespace diffkern

#include "cpu/intrinsics.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class Real>
struct VecOf;
template <>
struct VecOf<float> {
    using type = f32v;
};
template <>
struct VecOf<double> {
    using type = f64v;
};
template <class Real>
using Vec = typename VecOf<Real>::type;

DIFFKERN_INLINE u32v as_bits(f32v v) {
    return reinterpret_cast<u32v>(v);
}
DIFFKERN_INLINE f32v as_float(u32v v) {
    return reinterpret_cast<f32v>(v);
}

DIFFKERN_INLINE f32v broadcast(float v) {
    return v - f32v{};
}
DIFFKERN_INLINE f64v broadcast(double v) {
    return v - f64v{};
}

// a b + c, rounded once where the hardware can; for float32 in intrinsics.h.
DIFFKERN_INLINE f64v multiply_add(f64v a, f64v b, f64v c) {
#ifdef __FP_FAST_FMA
    f64v out;
    for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fma(a[i], b[i], c[i]);
    return out;
#else
    return a * b + c;
#endif
}

// The sum of the lanes, always in the same order: halves onto each other.
DIFFKERN_INLINE float sum(f32v v) {
#ifdef __AVX2__
    const __m256 eight = fold(v);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// The sums of four vectors, each as `sum` gives it, for less than a third of four calls.
DIFFKERN_INLINE void sum_each(const f32v* v, float* out) {
#ifdef __AVX2__
    __m128 q[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 eight = fold(v[i]);
        q[i] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    }
    const __m128 first = _mm_add_ps(_mm_unpacklo_ps(q[0], q[1]), _mm_unpackhi_ps(q[0], q[1]));
    const __m128 second = _mm_add_ps(_mm_unpacklo_ps(q[2], q[3]), _mm_unpackhi_ps(q[2], q[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first)));
#else
    for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

// ---- loads and stores: unaligned, any storage type ---------------------------------------------------------------

DIFFKERN_INLINE f32v load(const float* p) {
    f32v v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
DIFFKERN_INLINE f64v load(const double* p) {
    f64v v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
DIFFKERN_INLINE f32v load(const bf16* p) {
    u16v half;
    __builtin_memcpy(&half, p, sizeof half);
    return as_float(__builtin_convertvector(half, u32v) << 16);
}
DIFFKERN_INLINE f32v load(const f16* p) {
    return load_f16(p);
}

DIFFKERN_INLINE void store(float* p, f32v v) {
    __builtin_memcpy(p, &v, sizeof v);
}
DIFFKERN_INLINE void store(double* p, f64v v) {
    __builtin_memcpy(p, &v, sizeof v);
}
DIFFKERN_INLINE void store(bf16* p, f32v v) {
    const u32v bits = as_bits(v);
    const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const u32v quiet = (bits >> 16) | 0x40u;
    const u32v is_nan = reinterpret_cast<u32v>((bits & 0x7fffffffu) > 0x7f800000u);
    const u16v half = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), u16v);
    __builtin_memcpy(p, &half, sizeof half);
}
DIFFKERN_INLINE void store(f16* p, f32v v) {
    store_f16(p, v);
}

// The first n < kLanes lanes; the others are zero.
template <class T>
DIFFKERN_INLINE auto load_partial(const T* p, int n) {
    T lanes[kLanes] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned long>(n) * sizeof(T));
    return load(lanes);
}
template <class T, class V>
DIFFKERN_INLINE void store_partial(T* p, V v, int n) {
    T lanes[kLanes];
    store(lanes, v);
    __builtin_memcpy(p, lanes, static_cast<unsigned long>(n) * sizeof(T));
}

// v with all but the first n lanes zero.
DIFFKERN_INLINE f32v first_lanes(f32v v, int n) {
    if (n == kLanes) return v;
    float lanes[kLanes];
    store(lanes, v);
    return load_partial(lanes, n);
}

// kLanes lanes or fewer: what the body of a loop over any length needs.
template <class T>
DIFFKERN_INLINE auto load_n(const T* p, int n) {
    return n == kLanes ? load(p) : load_partial(p, n);
}
template <class T, class V>
DIFFKERN_INLINE void store_n(T* p, V v, int n) {
    if (n == kLanes)
        store(p, v);
    else
        store_partial(p, v, n);
}

// Runs fn(i, lanes) over [first, end): whole vectors with the constant kLanes, then what is left. Mark the lambda
// DIFFKERN_LAMBDA, so that the constant reaches its loads and stores.
#define DIFFKERN_LAMBDA __attribute__((always_inline))
template <class Fn>
DIFFKERN_INLINE void for_lanes(int64_t first, int64_t end, Fn fn) {
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) fn(i, kLanes);
    if (i < end) fn(i, static_cast<int>(end - i));
}

// ---- elementary functions ----------------------------------------------------------------------------------------

// exp(x), below 2 ulp; 0 < result < inf: x is clamped to [-87, 88], and a NaN gives some finite number.
// 2^n e^r with n = round(x / ln 2) and r = x - n ln 2 in [-ln(2)/2, ln(2)/2]; ln 2 in two parts (Cody and Waite), of
// which the first times n is exact.
DIFFKERN_INLINE f32v exp_clamped(f32v x) {
    x = at_least(at_most(x, 88.0f), -87.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
    const f32v t = x * 1.44269504f + magic;
    const f32v n = t - magic;
    const f32v r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32v p = r * 0.00138436535f + 0.0083741553f;
    p = p * r + 0.041668002f;
    p = p * r + 0.166664313f;
    p = p * r + 0.499999942f;
    p = p * r + 1.00000003f;
    p = p * r + 1.0f;
    return as_float(as_bits(p) + (as_bits(t) << 23));
}

// exp(-z), for SiLU: inf above float32; off by 3 float32 epsilons at most near 0, and by 3 more at z = -30, where
// rounding z itself costs 15. With AVX-512 it falls to 0 and NaN stays; elsewhere it ends at 1.6e-38, and a NaN gives
// some number. One constant for log2(e), exact in the fused operation.
#ifdef __AVX512F__
DIFFKERN_INLINE f32v exp_of_minus(f32v z) {
    const f32v minus_log2e = broadcast(-1.44269504f);
    const f32v n = round(z * minus_log2e);
    const f32v f =
        within_half(multiply_subtract(z, minus_log2e, n));  // beyond 2^23, where n no longer says what remains
    f32v p = f * 1.32647285e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
    return times_power_of_two(p, n);
}
#else
DIFFKERN_INLINE f32v exp_of_minus(f32v z) {
    return z < -88.0f ? broadcast(__builtin_inff()) : exp_clamped(-z);
}
#endif

// ln(1 + f) + e ln 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1] and whole e; ln 2 in two parts.
DIFFKERN_INLINE f32v log_of(f32v f, f32v e) {
    // ln(1 + f) = f - f^2/2 + f^3 P(f), P fitted at Chebyshev nodes
    f32v p = f * 0.07122081f - 0.11581538f;
    p = p * f + 0.11677974f;
    p = p * f - 0.12410096f;
    p = p * f + 0.14247764f;
    p = p * f - 0.16668487f;
    p = p * f + 0.20000803f;
    p = p * f - 0.24999989f;
    p = p * f + 0.3333333f;
    const f32v square = f * f;
    f32v tail = f * square * p;
    tail = tail + e * -2.12194440e-4f;
    tail = tail - 0.5f * square;
    return (f + tail) + e * 0.693359375f;
}

// ln(1 + x) for x >= 0, to a few 1e-7 of itself; some number above 88 for x = inf, NaN stays.
DIFFKERN_INLINE f32v log1p_positive(f32v x) {
    const f32v y = 1.0f + x;
    const u32v bits = as_bits(y) - 0x3f3504f3u;  // y = 2^e m with m in [sqrt(1/2), sqrt(2)), f = m - 1
    const f32v e = __builtin_convertvector(reinterpret_cast<i32v>(bits) >> 23, f32v);
    const f32v f = as_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    const i32v small = x < 0.4f;
    const f32v ln = log_of(small ? x : f, small ? broadcast(0.0f) : e);
    return x == x ? ln : x;
}

// 1 - exp(-z) for z >= 0, to a few 1e-7 of itself, given e = exp(-z); NaN stays.
DIFFKERN_INLINE f32v one_minus_exp(f32v z, f32v e) {
    f32v p = z * -1.9841270e-4f + 1.3888889e-3f;
    p = p * z - 8.3333333e-3f;
    p = p * z + 4.1666667e-2f;
    p = p * z - 1.6666667e-1f;
    p = p * z + 0.5f;
    const f32v series = z - z * z * p;  // Taylor's, off by z^8/40320
    return z < 0.4f ? series : 1.0f - e;
}

// z + exp(-z) - 1, to a few 1e-7 of itself or, beyond |z| = 1/2, of 1, given e = exp(-z); and its derivative 1 - e.
// NaN stays.
DIFFKERN_INLINE f32v exp_remainder(f32v z, f32v e, f32v& derivative) {
    f32v p = z * -2.7557319e-6f + 2.4801587e-5f;
    p = p * z - 1.9841270e-4f;
    p = p * z + 1.3888889e-3f;
    p = p * z - 8.3333333e-3f;
    p = p * z + 4.1666667e-2f;
    p = p * z - 1.6666667e-1f;
    p = p * z + 0.5f;
    const f32v series = z * z * p;
    const i32v small = (z < 0.5f) & (z > -0.5f);
    derivative = small ? z - series : 1.0f - e;
    return small ? series : (z - 1.0f) + e;
}

DIFFKERN_INLINE f32v silu(f32v z) {
    return z / (1.0f + exp_of_minus(z));
}

// d silu(z) / dz = s + s z (1 - s), with 1 - s = exp(-z) s, which does not cancel where s is near 1.
DIFFKERN_INLINE f32v silu_derivative(f32v z) {
    const f32v e = at_most(exp_of_minus(z), 8.5e37f);  // finite, so that e s is 1 and not NaN where s vanishes
    const f32v s = 1.0f / (1.0f + e);
    return s * (z * (e * s) + 1.0f);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
