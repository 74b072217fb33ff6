// Gradients of keys and of values over a tile: sums over the queries, which lie in the tile's lanes. So here the
// tile's numbers are broadcast and the channels of the queries, or of the output's gradient, lie in lanes: nothing is
// transposed.
#pragma once

#include "cpu/attention_tile.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr int kChannelLanes = 8;  // rows of channels are padded to this many: half an AVX-512 register

typedef float octet __attribute__((vector_size(4 * kChannelLanes)));

template <class V>
DIFFKERN_INLINE V load_as(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// out[key][channel] += sum over the queries of tile[key][query] rows[query][channel], for kKeys keys and kVectors
// vectors V of channels.
template <class V, int kKeys, int kVectors>
DIFFKERN_INLINE void gradient_panel(const float* tile, int64_t width, int64_t queries, const float* rows,
                                    int64_t channels, float* out) {
    constexpr int kSize = sizeof(V) / sizeof(float);
    V total[kKeys][kVectors];
    for (int j = 0; j < kKeys; ++j)
        for (int v = 0; v < kVectors; ++v) total[j][v] = V{};
    for (int64_t i = 0; i < queries; ++i, rows += channels) {
        V row[kVectors];
        for (int v = 0; v < kVectors; ++v) row[v] = load_as<V>(rows + v * kSize);
        for (int j = 0; j < kKeys; ++j) {
            const float weight = tile[j * width + i];
            for (int v = 0; v < kVectors; ++v) total[j][v] += weight * row[v];
        }
    }
    for (int j = 0; j < kKeys; ++j)
        for (int v = 0; v < kVectors; ++v) {
            float* at = out + j * channels + v * kSize;
            const V sum = load_as<V>(at) + total[j][v];
            __builtin_memcpy(at, &sum, sizeof sum);
        }
}

template <int kKeys>
DIFFKERN_INLINE void gradient_rows(const float* tile, int64_t width, int64_t queries, const float* rows,
                                   int64_t channels, float* out) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
        for (int j = 0; j < kKeys; j += kRows)
            gradient_panel<f32v, kRows, 2>(tile + j * width, width, queries, rows + c, channels,
                                           out + j * channels + c);
    for (; c + kLanes <= channels; c += kLanes)
        gradient_panel<f32v, kKeys, 1>(tile, width, queries, rows + c, channels, out + c);
    if constexpr (kLanes > kChannelLanes)
        if (c < channels) gradient_panel<octet, kKeys, 1>(tile, width, queries, rows + c, channels, out + c);
}

// out[key][channel] += sum over the queries of tile[key][query] rows[query][channel]. `keys` is a multiple of kRows,
// `channels` of kChannelLanes, and rows of the tile lie `width` apart.
inline void accumulate_gradient(const float* tile, int64_t width, int64_t keys, int64_t queries, const float* rows,
                                int64_t channels, float* out) {
    int64_t j = 0;
    for (; j + 8 <= keys; j += 8)
        gradient_rows<8>(tile + j * width, width, queries, rows, channels, out + j * channels);
    if constexpr (kRows < 8)
        if (j < keys) gradient_rows<kRows>(tile + j * width, width, queries, rows, channels, out + j * channels);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
