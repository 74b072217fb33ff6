// The matrix products of attention over a tile: some keys by the queries of a block, of which each has a lane.
//
// Queries lie in the lanes of kVectors vectors, and what they are multiplied by, keys' channels or values, is broadcast
// from panels of kRows. So a product keeps kRows x kVectors sums in registers, and reads for each kRows x kVectors
// multiplications kVectors vectors and kRows numbers: as many multiplications run as the processor has room for.
#pragma once

#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

#ifdef __AVX512F__
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kMostVectors = 2;
constexpr int kBlock = kMostVectors * kLanes;  // queries of a block

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.693147181f;

// The larger of each two; either may be a NaN's.
DIFFKERN_INLINE f32v larger(f32v a, f32v b) {
#if defined(__AVX512F__)
    return reinterpret_cast<f32v>(_mm512_max_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<f32v>(_mm256_max_ps(reinterpret_cast<Register>(a), reinterpret_cast<Register>(b)));
#else
    return a > b ? a : b;
#endif
}

// 2^x for x up to 100, below 1 ulp; 0 from 2^-126 (with AVX-512 2^-149) down, NaN stays.
DIFFKERN_INLINE f32v exp2(f32v x) {
#ifdef __AVX512F__
    x = larger(broadcast(-160.0f), x);  // a NaN is the second
    const f32v n = round(x);
    const f32v f = x - n;
#else
    const i32v vanishes = x < -126.0f;
    x = vanishes ? broadcast(-126.0f) : x;
    const f32v t = x + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
    const f32v f = x - (t - 12582912.0f);
#endif
    f32v p = f * 1.5345812e-4f + 1.3399931e-3f;
    p = p * f + 9.618489e-3f;
    p = p * f + 5.5503286e-2f;
    p = p * f + 0.24022646f;
    p = p * f + 0.6931472f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return times_power_of_two(p, n);
#else
    return vanishes ? f32v{} : p * as_float((as_bits(t) << 23) + 0x3f800000u);
#endif
}

// tile[key][lane] of kRows keys, of which the first `keys` are wanted: the products of a panel of keys [channel][kRows]
// with the queries [channel][lane] over some channels, added to what stands there if these are not the first channels.
// Raises `highest`, where kHighest, to the results.
template <int kVectors, bool kWhole, bool kHighest>
DIFFKERN_INLINE void score_panel(const float* panel, const float* queries, int64_t keys, int64_t channels, bool add,
                                 float* tile, f32v* highest) {
    constexpr int kWidth = kVectors * kLanes;
    f32v total[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) total[r][v] = f32v{};
    for (int64_t c = 0; c < channels; ++c, panel += kRows, queries += kWidth) {
        f32v query[kVectors];
        for (int v = 0; v < kVectors; ++v) query[v] = load(queries + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
            const f32v key = broadcast(panel[r]);
            for (int v = 0; v < kVectors; ++v) total[r][v] = multiply_add(key, query[v], total[r][v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) {
            if (!kWhole && r >= keys) continue;
            float* at = tile + r * kWidth + v * kLanes;
            if (add) total[r][v] += load(at);
            store(at, total[r][v]);
            if (kHighest) highest[v] = larger(highest[v], total[r][v]);
        }
}

// The tile of `keys` keys, and `highest` raised to its values. Channels are taken kChannels at a time: that many of
// the queries stay in the first-level cache, and a sum of few terms is rounded less.
template <int kVectors, bool kHighest>
DIFFKERN_INLINE void scores(const float* panels, const float* queries, int64_t keys, int64_t channels, float* tile,
                            f32v* highest) {
    constexpr int64_t kChannels = 64;
    constexpr int kWidth = kVectors * kLanes;
    f32v most[kVectors] = {};
    for (int64_t c = 0; c < channels; c += kChannels) {
        const int64_t some = channels - c < kChannels ? channels - c : kChannels;
        if (kHighest)
            for (int v = 0; v < kVectors; ++v) most[v] = highest[v];
        int64_t j = 0;
        for (; j + kRows <= keys; j += kRows)
            score_panel<kVectors, true, kHighest>(panels + j * channels + c * kRows, queries + c * kWidth, kRows, some,
                                                  c > 0, tile + j * kWidth, most);
        if (j < keys)
            score_panel<kVectors, false, kHighest>(panels + j * channels + c * kRows, queries + c * kWidth, keys - j,
                                                   some, c > 0, tile + j * kWidth, most);
    }
    if (kHighest)
        for (int v = 0; v < kVectors; ++v) highest[v] = most[v];
}

// The products of two packed sets of rows, [channel][lane] against [channel][key], alone.
template <int kVectors>
inline void products(const float* panels, const float* queries, int64_t keys, int64_t channels, float* tile) {
    scores<kVectors, false>(panels, queries, keys, channels, tile, nullptr);
}

// out[channel][lane] = out[channel][lane] factor[lane] + sum over the keys of tile[key][lane] values[key][channel], for
// a panel of kRows channels. Without `factor` the sum alone.
template <int kVectors>
inline void accumulate(const float* tile, const float* values, int64_t keys, const f32v* factor, float* out) {
    constexpr int kWidth = kVectors * kLanes;
    f32v total[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) total[r][v] = f32v{};
    for (int64_t j = 0; j < keys; ++j, tile += kWidth, values += kRows) {
        f32v weight[kVectors];
        for (int v = 0; v < kVectors; ++v) weight[v] = load(tile + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
            const f32v value = broadcast(values[r]);
            for (int v = 0; v < kVectors; ++v) total[r][v] = multiply_add(value, weight[v], total[r][v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) {
            float* at = out + r * kWidth + v * kLanes;
            store(at, factor ? multiply_add(load(at), factor[v], total[r][v]) : total[r][v]);
        }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
