// Four float32 lanes on every instruction set: the piece that layouts are changed by.
#pragma once

#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

typedef float quad __attribute__((vector_size(16)));

DIFFKERN_INLINE quad load_quad(const float* p) {
    quad v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
DIFFKERN_INLINE quad load_quad(const bf16* p) {
    typedef uint16_t u16q __attribute__((vector_size(8)));
    typedef uint32_t u32q __attribute__((vector_size(16)));
    u16q half;
    __builtin_memcpy(&half, p, sizeof half);
    return reinterpret_cast<quad>(__builtin_convertvector(half, u32q) << 16);
}
DIFFKERN_INLINE quad load_quad(const f16* p) {
#ifdef __F16C__
    return reinterpret_cast<quad>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return quad{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}

DIFFKERN_INLINE void store_quad(float* p, quad v) {
    __builtin_memcpy(p, &v, sizeof v);
}
DIFFKERN_INLINE void store_quad(bf16* p, quad v) {
    for (int i = 0; i < 4; ++i) p[i] = to_bf16(v[i]);
}
DIFFKERN_INLINE void store_quad(f16* p, quad v) {
#ifdef __F16C__
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                     _mm_cvtps_ph(reinterpret_cast<__m128>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 4; ++i) p[i] = to_f16(v[i]);
#endif
}

DIFFKERN_INLINE void store_value(float* p, float v) {
    *p = v;
}
DIFFKERN_INLINE void store_value(bf16* p, float v) {
    *p = to_bf16(v);
}
DIFFKERN_INLINE void store_value(f16* p, float v) {
    *p = to_f16(v);
}

// Rows become columns.
DIFFKERN_INLINE void transpose(quad* v) {
    const quad low01 = {v[0][0], v[1][0], v[0][1], v[1][1]}, high01 = {v[0][2], v[1][2], v[0][3], v[1][3]};
    const quad low23 = {v[2][0], v[3][0], v[2][1], v[3][1]}, high23 = {v[2][2], v[3][2], v[2][3], v[3][3]};
    v[0] = quad{low01[0], low01[1], low23[0], low23[1]};
    v[1] = quad{low01[2], low01[3], low23[2], low23[3]};
    v[2] = quad{high01[0], high01[1], high23[0], high23[1]};
    v[3] = quad{high01[2], high01[3], high23[2], high23[3]};
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
