// Standard normals from Philox counters, 4 * kLanes at a time (a counter a lane, four words each).
//
// Box-Muller on integers g: u = (g + 1/2)*2^-32,  z = sqrt(-2 ln u1) * (cos, sin)(2 pi u2).
// float32 stays within 4 ulp of the exact function of the integers because nothing is rounded before it has to be:
//   ln u1   above u1 = 1/2 from the integer complement (~g + 1/2)*2^-32, near 1 as its log1p, elsewhere from exponent
//           and mantissa;
//   angle   the quadrant is taken from the integer, what remains in [-pi/4, pi/4] is converted once.
// Cost: about 11 vector instructions a normal, so memory-bound only with slow memory. float64 goes through libm.
#pragma once

#include "common/philox.h"
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// Where the noise of one sample comes from.
struct NoiseStream {
    PhiloxKey key;
    CounterTail tail;
};

struct Words {
    u32v g[4];
};

#ifdef __AVX2__
// A counter a 64-bit lane, of which a multiplication reads only the low half: so the high halves may hold anything, and
// neither blends nor shuffles are needed until the end.
DIFFKERN_INLINE void philox_round(u64v c[4], uint64_t k0, uint64_t k1) {
    const u64v p0 = multiply_low(c[0], kPhiloxM0), p1 = multiply_low(c[2], kPhiloxM1);
    c[0] = (p1 >> 32) ^ (c[1] ^ k0);
    c[2] = (p0 >> 32) ^ (c[3] ^ k1);
    c[1] = p1;
    c[3] = p0;
}

DIFFKERN_INLINE Words philox_words(NoiseStream s, uint32_t block) {
    // Two registers of counters, ordered so that the packing at the end puts counter j in lane j.
    u64v a[4], b[4];
    for (int i = 0; i < kLanes / 2; ++i) {
        const int first = i / 2 * 4 + i % 2;
        a[0][i] = block + static_cast<uint32_t>(first);
        b[0][i] = block + static_cast<uint32_t>(first + 2);
    }
    a[1] = b[1] = s.tail.c1 - u64v{};
    a[2] = b[2] = s.tail.c2 - u64v{};
    a[3] = b[3] = s.tail.c3 - u64v{};
    PhiloxKey key = s.key;
    for (int round = 0; round < kPhiloxRounds; ++round) {
        philox_round(a, key.k0, key.k1);
        philox_round(b, key.k0, key.k1);
        key.k0 += kPhiloxW0;
        key.k1 += kPhiloxW1;
    }
    Words w;
    for (int i = 0; i < 4; ++i) w.g[i] = pack_low(a[i], b[i]);
    return w;
}
#else
DIFFKERN_INLINE Words philox_words(NoiseStream s, uint32_t block) {
    Words w;
    for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t g[4];
        philox4x32(s.key, block + static_cast<uint32_t>(lane), s.tail, g);
        for (int i = 0; i < 4; ++i) w.g[i][lane] = g[i];
    }
    return w;
}
#endif

// float(g) + 1/2, rounded once where there is a fused multiply-add.
DIFFKERN_INLINE f32v to_float_plus_half(u32v g) {
    const f32v high = __builtin_convertvector(reinterpret_cast<i32v>(g >> 16), f32v);
    const f32v low = __builtin_convertvector(reinterpret_cast<i32v>(g & 0xffffu), f32v);
    return high * 65536.0f + (low + 0.5f);
}

// sqrt(-2 ln((g + 1/2)*2^-32))
DIFFKERN_INLINE f32v radius(u32v g) {
    const i32v upper = reinterpret_cast<i32v>(g) < 0;  // u1 > 1/2: the integer complement rounds to a finer grid
    const i32v near_one = g > 0xB504F333u;             // u1 > sqrt(1/2)
    const f32v scaled = to_float_plus_half(g ^ reinterpret_cast<u32v>(upper)) * 2.3283064365386963e-10f;
    // u1 = 2^e * m with m in [sqrt(1/2), sqrt(2)), f = m - 1; from the complement exactly, without a further rounding.
    const u32v bits = as_bits(scaled) - 0x3f3504f3u;
    const f32v e_lower = __builtin_convertvector(reinterpret_cast<i32v>(bits) >> 23, f32v);
    const f32v f_lower = as_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    const f32v f = near_one ? -scaled : upper ? 1.0f - 2.0f * scaled : f_lower;
    const f32v e = near_one ? broadcast(0.0f) : upper ? broadcast(-1.0f) : e_lower;
    return sqrt(-2.0f * log_of(f, e));
}

// cos and sin of 2 pi (g + 1/2)*2^-32
DIFFKERN_INLINE void cos_sin(u32v g, f32v& cosine, f32v& sine) {
    const u32v shifted = g + 0x20000000u;
    const u32v quadrant = shifted >> 30;
    // 2r + 1 for the remainder r in [-2^29, 2^29): the half is in the integer, the conversion rounds once.
    const i32v odd = reinterpret_cast<i32v>(((shifted & 0x3fffffffu) - 0x20000000u) * 2u + 1u);
    const f32v z = __builtin_convertvector(odd, f32v) * 9.31322574615478515625e-10f;  // angle = pi/4 z, z in [-1, 1]
    const f32v w = z * z;
    // sin(pi/4 z) and cos(pi/4 z); the leading sine coefficient is split so that its own rounding does not count.
    f32v s = w * 3.09882983e-7f - 3.65740524e-5f;
    s = s * w + 2.49039415e-3f;
    s = s * w - 8.07455122e-2f;
    f32v c = w * 3.49545111e-6f - 3.25934981e-4f;
    c = c * w + 1.58543771e-2f;
    c = c * w - 3.08425158e-1f;
#ifdef __FMA__
    const f32v sin_z = z * 0.785398185253143310546875f + z * (s * w - 2.18556929e-8f);
    const f32v cos_z = c * w + 1.0f;
#else
    // Without a fused multiply-add the last products would round once more: take them in double.
    const f64v leading = __builtin_convertvector(z, f64v) * 0.7853981633974483;
    const f32v sin_z = __builtin_convertvector(leading + __builtin_convertvector(z * (s * w), f64v), f32v);
    const f64v product = __builtin_convertvector(c, f64v) * __builtin_convertvector(w, f64v);
    const f32v cos_z = __builtin_convertvector(product + 1.0, f32v);
#endif
    const i32v swap = reinterpret_cast<i32v>((quadrant & 1u) != 0u);
    const u32v cos_sign = ((quadrant + 1u) & 2u) << 30;
    const u32v sin_sign = (quadrant & 2u) << 30;
    cosine = as_float(as_bits(swap ? sin_z : cos_z) ^ cos_sign);
    sine = as_float(as_bits(swap ? cos_z : sin_z) ^ sin_sign);
}

// The normals of counters block .. block + kLanes - 1, in element order.
DIFFKERN_INLINE void normals_of_blocks(NoiseStream s, uint32_t block, float* out) {
    const Words w = philox_words(s, block);
    f32v c0, s0, c1, s1;
    cos_sin(w.g[1], c0, s0);
    cos_sin(w.g[3], c1, s1);
    const f32v r0 = radius(w.g[0]), r1 = radius(w.g[2]);
    const f32v a = r0 * c0, b = r0 * s0, c = r1 * c1, d = r1 * s1;
    // Transpose 4 x kLanes to kLanes x 4.
#ifdef __AVX2__
    const f32v ab_low = unpack_low(a, b), ab_high = unpack_high(a, b);
    const f32v cd_low = unpack_low(c, d), cd_high = unpack_high(c, d);
    // Part p of quads k holds counter 4p + k.
    const f32v quads[4] = {low_pairs(ab_low, cd_low), high_pairs(ab_low, cd_low), low_pairs(ab_high, cd_high),
                           high_pairs(ab_high, cd_high)};
    for (int k = 0; k < 4; ++k) {
        store_part<0>(out + 4 * k, quads[k]);
        store_part<1>(out + 16 + 4 * k, quads[k]);
#ifdef __AVX512F__
        store_part<2>(out + 32 + 4 * k, quads[k]);
        store_part<3>(out + 48 + 4 * k, quads[k]);
#endif
    }
#else
    for (int j = 0; j < kLanes; ++j) {
        out[4 * j] = a[j];
        out[4 * j + 1] = b[j];
        out[4 * j + 2] = c[j];
        out[4 * j + 3] = d[j];
    }
#endif
}

// The same in float64, through libm.
inline void normals_of_blocks(NoiseStream s, uint32_t block, double* out) {
    for (int j = 0; j < kLanes; ++j) {
        uint32_t g[4];
        philox4x32(s.key, block + static_cast<uint32_t>(j), s.tail, g);
        for (int pair = 0; pair < 2; ++pair) {
            const double r = __builtin_sqrt(-2.0 * __builtin_log((g[2 * pair] + 0.5) * 0x1p-32));
            const uint32_t shifted = g[2 * pair + 1] + 0x20000000u, quadrant = shifted >> 30;
            const double angle = ((shifted & 0x3fffffffu) - 536870912.0 + 0.5) * (6.283185307179586 * 0x1p-32);
            const double c = r * __builtin_cos(angle), s = r * __builtin_sin(angle);
            const double of_cos = quadrant & 1u ? s : c, of_sin = quadrant & 1u ? c : s;
            out[4 * j + 2 * pair] = (quadrant + 1u) & 2u ? -of_cos : of_cos;
            out[4 * j + 2 * pair + 1] = quadrant & 2u ? -of_sin : of_sin;
        }
    }
}

// Normals of elements [first, first + count) of a sample, in NCHW order.
template <class Real>
inline void fill_normals(NoiseStream s, int64_t first, int64_t count, Real* out) {
    Real whole[4 * kLanes];
    while (count > 0) {
        const int64_t block = first / 4;
        const int64_t skip = first - 4 * block;
        const int64_t here = count < 4 * kLanes - skip ? count : 4 * kLanes - skip;
        if (here == 4 * kLanes) {
            normals_of_blocks(s, static_cast<uint32_t>(block), out);
        } else {
            normals_of_blocks(s, static_cast<uint32_t>(block), whole);
            for (int64_t i = 0; i < here; ++i) out[i] = whole[skip + i];
        }
        first += here;
        out += here;
        count -= here;
    }
}

// How the elements of a sample lie in memory: contiguous (pixel stride 1), or channels last.
struct SampleLayout {
    int64_t channels, pixels;
    bool channels_last;
};

// Normals of the elements at memory positions [first, first + count) of a sample. Channels last: both are whole pixels,
// and `row` has room for count / channels values.
template <class Real>
inline void fill_normals(NoiseStream s, const SampleLayout& layout, int64_t first, int64_t count, Real* out,
                         Real* row) {
    if (!layout.channels_last) return fill_normals(s, first, count, out);
    const int64_t pixel = first / layout.channels, pixels = count / layout.channels;
    for (int64_t c = 0; c < layout.channels; ++c) {
        fill_normals(s, c * layout.pixels + pixel, pixels, row);
        for (int64_t p = 0; p < pixels; ++p) out[p * layout.channels + c] = row[p];
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
