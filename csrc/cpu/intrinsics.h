// The few operations that vector extensions do not express, once per instruction set: AVX-512, AVX2, and plain C++ for
// the portable path. Included by vec.h, after its types and inside no namespace; the sets define the same names.
#pragma once

namespace diffkern {
namespace DIFFKERN_ISA {

#if defined(__AVX512F__)

using Register = __m512;

DIFFKERN_INLINE f32v sqrt(f32v v) {
    return reinterpret_cast<f32v>(_mm512_sqrt_ps(reinterpret_cast<Register>(v)));
}
DIFFKERN_INLINE f32v at_most(f32v v, float limit) {
    return reinterpret_cast<f32v>(_mm512_min_ps(reinterpret_cast<Register>(v), _mm512_set1_ps(limit)));
}
DIFFKERN_INLINE f32v at_least(f32v v, float limit) {
    return reinterpret_cast<f32v>(_mm512_max_ps(reinterpret_cast<Register>(v), _mm512_set1_ps(limit)));
}
// To the nearest integer, ties to even.
DIFFKERN_INLINE f32v round(f32v v) {
    return reinterpret_cast<f32v>(_mm512_roundscale_ps(reinterpret_cast<Register>(v), 0x08));
}
// a b - c and a b + c, rounded once where the hardware can: said outright, since compilers contract as their options
// have it.
DIFFKERN_INLINE f32v multiply_subtract(f32v a, f32v b, f32v c) {
    return reinterpret_cast<f32v>(
        _mm512_fmsub_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), reinterpret_cast<Register>(c)));
}
DIFFKERN_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
    return reinterpret_cast<f32v>(
        _mm512_fmadd_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), reinterpret_cast<Register>(c)));
}
// v where |v| <= 1/2, else 1/2 with v's sign (a NaN gives 1/2).
DIFFKERN_INLINE f32v within_half(f32v v) {
    return reinterpret_cast<f32v>(_mm512_range_ps(reinterpret_cast<Register>(v), _mm512_set1_ps(0.5f), 0x2));
}
// v * 2^n for whole n, right to 0 and inf.
DIFFKERN_INLINE f32v times_power_of_two(f32v v, f32v n) {
    return reinterpret_cast<f32v>(_mm512_scalef_ps(reinterpret_cast<Register>(v), reinterpret_cast<Register>(n)));
}
DIFFKERN_INLINE bool any(i32v condition) {
    const __m512i bits = reinterpret_cast<__m512i>(condition);
    return _mm512_test_epi32_mask(bits, bits) != 0;
}
DIFFKERN_INLINE __m256 fold(f32v v) {
    const Register wide = reinterpret_cast<Register>(v);
    return _mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
}
DIFFKERN_INLINE f32v load_f16(const f16* p) {
    return reinterpret_cast<f32v>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
DIFFKERN_INLINE void store_f16(f16* p, f32v v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(reinterpret_cast<Register>(v), _MM_FROUND_TO_NEAREST_INT));
}
DIFFKERN_INLINE u64v multiply_low(u64v v, uint32_t factor) {
    return reinterpret_cast<u64v>(_mm512_mul_epu32(reinterpret_cast<__m512i>(v), _mm512_set1_epi64(factor)));
}
DIFFKERN_INLINE u32v pack_low(u64v a, u64v b) {
    return reinterpret_cast<u32v>(
        _mm512_shuffle_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), 0x88));
}
DIFFKERN_INLINE f32v unpack_low(f32v a, f32v b) {
    return reinterpret_cast<f32v>(_mm512_unpacklo_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b)));
}
DIFFKERN_INLINE f32v unpack_high(f32v a, f32v b) {
    return reinterpret_cast<f32v>(_mm512_unpackhi_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b)));
}
DIFFKERN_INLINE f32v low_pairs(f32v a, f32v b) {
    return reinterpret_cast<f32v>(
        _mm512_shuffle_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), 0x44));
}
DIFFKERN_INLINE f32v high_pairs(f32v a, f32v b) {
    return reinterpret_cast<f32v>(
        _mm512_shuffle_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), 0xee));
}
template <int kPart>
DIFFKERN_INLINE void store_part(float* p, f32v v) {
    _mm_storeu_ps(p, _mm512_extractf32x4_ps(reinterpret_cast<Register>(v), kPart));
}

#elif defined(__AVX2__)

using Register = __m256;

DIFFKERN_INLINE f32v sqrt(f32v v) {
    return reinterpret_cast<f32v>(_mm256_sqrt_ps(reinterpret_cast<Register>(v)));
}
DIFFKERN_INLINE f32v at_most(f32v v, float limit) {
    return reinterpret_cast<f32v>(_mm256_min_ps(reinterpret_cast<Register>(v), _mm256_set1_ps(limit)));
}
DIFFKERN_INLINE f32v at_least(f32v v, float limit) {
    return reinterpret_cast<f32v>(_mm256_max_ps(reinterpret_cast<Register>(v), _mm256_set1_ps(limit)));
}
DIFFKERN_INLINE f32v multiply_subtract(f32v a, f32v b, f32v c) {
    return reinterpret_cast<f32v>(
        _mm256_fmsub_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), reinterpret_cast<Register>(c)));
}
DIFFKERN_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
    return reinterpret_cast<f32v>(
        _mm256_fmadd_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), reinterpret_cast<Register>(c)));
}
DIFFKERN_INLINE bool any(i32v condition) {
    return _mm256_movemask_ps(reinterpret_cast<Register>(condition)) != 0;
}
DIFFKERN_INLINE __m256 fold(f32v v) {
    return reinterpret_cast<Register>(v);
}
DIFFKERN_INLINE f32v load_f16(const f16* p) {
    return reinterpret_cast<f32v>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
DIFFKERN_INLINE void store_f16(f16* p, f32v v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<Register>(v), _MM_FROUND_TO_NEAREST_INT));
}
DIFFKERN_INLINE u64v multiply_low(u64v v, uint32_t factor) {
    return reinterpret_cast<u64v>(_mm256_mul_epu32(reinterpret_cast<__m256i>(v), _mm256_set1_epi64x(factor)));
}
DIFFKERN_INLINE u32v pack_low(u64v a, u64v b) {
    return reinterpret_cast<u32v>(
        _mm256_shuffle_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), 0x88));
}
DIFFKERN_INLINE f32v unpack_low(f32v a, f32v b) {
    return reinterpret_cast<f32v>(_mm256_unpacklo_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b)));
}
DIFFKERN_INLINE f32v unpack_high(f32v a, f32v b) {
    return reinterpret_cast<f32v>(_mm256_unpackhi_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b)));
}
DIFFKERN_INLINE f32v low_pairs(f32v a, f32v b) {
    return reinterpret_cast<f32v>(
        _mm256_shuffle_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), 0x44));
}
DIFFKERN_INLINE f32v high_pairs(f32v a, f32v b) {
    return reinterpret_cast<f32v>(
        _mm256_shuffle_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b), 0xee));
}
template <int kPart>
DIFFKERN_INLINE void store_part(float* p, f32v v) {
    _mm_storeu_ps(p, _mm256_extractf128_ps(reinterpret_cast<Register>(v), kPart));
}

#else

DIFFKERN_INLINE f32v sqrt(f32v v) {
    f32v out;
    for (int i = 0; i < kLanes; ++i) out[i] = __builtin_sqrtf(v[i]);
    return out;
}
DIFFKERN_INLINE f32v at_most(f32v v, float limit) {
    return v < limit ? v : limit - f32v{};
}
DIFFKERN_INLINE f32v at_least(f32v v, float limit) {
    return v > limit ? v : limit - f32v{};
}
DIFFKERN_INLINE f32v multiply_subtract(f32v a, f32v b, f32v c) {
    return a * b - c;
}
DIFFKERN_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
#ifdef __FP_FAST_FMAF
    f32v out;
    for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
#else
    return a * b + c;
#endif
}
DIFFKERN_INLINE bool any(i32v condition) {
    return (condition[0] | condition[1] | condition[2] | condition[3]) != 0;
}
DIFFKERN_INLINE f32v load_f16(const f16* p) {
    f32v v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
    return v;
}
DIFFKERN_INLINE void store_f16(f16* p, f32v v) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_f16(v[i]);
}

#endif

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
