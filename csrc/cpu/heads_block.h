// A block of positions of one head, between a tensor in any memory order and type and a scratch in float32 whose rows
// are the head's channels. Where the tensor has channels next to each other, four positions of kLanes channels are
// transposed in registers.
#pragma once

#include "cpu/linear_attention.h"
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

inline int64_t whole_vectors(int64_t count) {
    return (count + kLanes - 1) / kLanes * kLanes;
}
inline int64_t whole_fours(int64_t count) {
    return (count + 3) / 4 * 4;
}

// to[(4 p + k) * stride + i] = lane 4 p + k of rows[i], for i < 4 and the first `lanes` lanes, in fours.
DIFFKERN_INLINE void store_transposed(const f32v* rows, int64_t lanes, float* to, int64_t stride) {
#ifdef __AVX2__
    const f32v low = unpack_low(rows[0], rows[1]), high = unpack_high(rows[0], rows[1]);
    const f32v low2 = unpack_low(rows[2], rows[3]), high2 = unpack_high(rows[2], rows[3]);
    const f32v fours[4] = {low_pairs(low, low2), high_pairs(low, low2), low_pairs(high, high2),
                           high_pairs(high, high2)};
    for (int k = 0; k < 4; ++k) {
        store_part<0>(to + k * stride, fours[k]);
        if (lanes > 4) store_part<1>(to + (4 + k) * stride, fours[k]);
#ifdef __AVX512F__
        if (lanes > 8) store_part<2>(to + (8 + k) * stride, fours[k]);
        if (lanes > 12) store_part<3>(to + (12 + k) * stride, fours[k]);
#endif
    }
#else
    for (int64_t lane = 0; lane < whole_fours(lanes < kLanes ? lanes : kLanes); ++lane)
        for (int i = 0; i < 4; ++i) to[lane * stride + i] = rows[i][lane];
#endif
}

// A row of a block is too short for the processor to see where the next one begins.
constexpr int64_t kRowsAhead = 4;

template <class T>
void load_block(const T* x, int64_t channels, int64_t channel, int64_t position, int64_t width, float* block,
                int64_t stride) {
    if (position == 1) {
        for (int64_t c = 0; c < channels; ++c)
            for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
                __builtin_prefetch(x + (c + kRowsAhead) * channel + i);
                store(block + c * stride + i, load_n(x + c * channel + i, n));
            });
        return;
    }
    if (channel == 1) {
        for (int64_t i = 0; i < width; i += 4)
            for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
                f32v rows[4] = {};
                for (int64_t k = 0; k < 4 && i + k < width; ++k) rows[k] = load_n(x + (i + k) * position + c, n);
                store_transposed(rows, n, block + c * stride + i, stride);
            });
        return;
    }
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < width; ++i) block[c * stride + i] = to_float(x[c * channel + i * position]);
}

// block[c * stride + i] for c < channels and i < width, from position `first` on; 0 up to whole vectors of positions.
// Rows up to a whole four of channels may be written.
inline void load_block(const HeadsView& x, int64_t sample, int64_t head, int64_t channels, int64_t first, int64_t width,
                       float* block, int64_t stride) {
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = width; i < whole_vectors(width); ++i) block[c * stride + i] = 0.0f;
    const int64_t offset = sample * x.sample + head * x.head + first * x.position;
    const char* data = x.data + offset * size_of(x.dtype);
    switch (x.dtype) {
        case DType::bf16:
            return load_block(reinterpret_cast<const bf16*>(data), channels, x.channel, x.position, width, block,
                              stride);
        case DType::f16:
            return load_block(reinterpret_cast<const f16*>(data), channels, x.channel, x.position, width, block,
                              stride);
        default:
            return load_block(reinterpret_cast<const float*>(data), channels, x.channel, x.position, width, block,
                              stride);
    }
}

DIFFKERN_INLINE void store_one(float* p, float value) {
    *p = value;
}
DIFFKERN_INLINE void store_one(bf16* p, float value) {
    *p = to_bf16(value);
}
DIFFKERN_INLINE void store_one(f16* p, float value) {
    *p = to_f16(value);
}

template <class T>
void store_block(const float* block, int64_t stride, int64_t channels, int64_t channel, int64_t position, int64_t width,
                 float* few, T* x) {
    if (position == 1) {
        for (int64_t c = 0; c < channels; ++c)
            for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
                store_n(x + c * channel + i, load(block + c * stride + i), n);
            });
        return;
    }
    if (channel != 1) {
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t i = 0; i < width; ++i) store_one(x + c * channel + i * position, block[c * stride + i]);
        return;
    }
    const int64_t row = whole_vectors(channels);
    for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        for (int64_t c = 0; c < channels; c += 4) {
            f32v rows[4] = {};
            for (int64_t k = 0; k < 4 && c + k < channels; ++k) rows[k] = load(block + (c + k) * stride + i);
            store_transposed(rows, kLanes, few + c, row);
        }
        for (int k = 0; k < n; ++k)
            for_lanes(0, channels, [&](int64_t c, int m) DIFFKERN_LAMBDA {
                store_n(x + (i + k) * position + c, load(few + k * row + c), m);
            });
    });
}

// The other way. `few` is a scratch of few_positions(channels).
inline int64_t few_positions(int64_t channels) {
    return kLanes * whole_vectors(channels);
}
inline void store_block(const float* block, int64_t stride, const HeadsView& x, int64_t sample, int64_t head,
                        int64_t channels, int64_t first, int64_t width, float* few) {
    const int64_t offset = sample * x.sample + head * x.head + first * x.position;
    char* data = x.data + offset * size_of(x.dtype);
    switch (x.dtype) {
        case DType::bf16:
            return store_block(block, stride, channels, x.channel, x.position, width, few,
                               reinterpret_cast<bf16*>(data));
        case DType::f16:
            return store_block(block, stride, channels, x.channel, x.position, width, few,
                               reinterpret_cast<f16*>(data));
        default:
            return store_block(block, stride, channels, x.channel, x.position, width, few,
                               reinterpret_cast<float*>(data));
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
