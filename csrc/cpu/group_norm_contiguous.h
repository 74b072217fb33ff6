// group_norm on contiguous tensors: a group of a sample is one slab of channels_per_group * pixels values, or two where
// some of its channels are x's and some skip's. A task is a few slabs. Forward reads x from memory once (the second and
// third look at a slab find it in a cache unless it passes the second level) and writes y once: 8 bytes an element in
// float32. Backward reads x and dy and writes dx.
#pragma once

#include "cpu/group_norm_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr int64_t kBlock = 4096;  // values whose statistics are taken while they are in the first-level cache
// Values that fit the second-level cache beside the slab they come after. So far ahead x is asked for while y is made:
// that arithmetic leaves the memory idle, and the statistics, which come next, are bound by it.
constexpr int64_t kAhead = 65536;

struct DeviationSums {
    double first, second;  // of d and of d^2
};

// Over the whole vectors of [0, count).
template <class T>
DIFFKERN_INLINE void vector_sums(const T* x, int64_t count, float center, f32v& first, f32v& second) {
    f32v rest[4] = {}, square[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
        for (int u = 0; u < 4; ++u) {
            const f32v d = load(x + i + u * kLanes) - center;
            rest[u] += d;
            square[u] += d * d;
        }
    for (; i + kLanes <= count; i += kLanes) {
        const f32v d = load(x + i) - center;
        rest[0] += d;
        square[0] += d * d;
    }
    first = (rest[0] + rest[1]) + (rest[2] + rest[3]);
    second = (square[0] + square[1]) + (square[2] + square[3]);
}

// Over what is left behind the last whole vector.
template <class T>
DIFFKERN_INLINE DeviationSums tail_sums(const T* x, int64_t count, float center) {
    DeviationSums sums = {0, 0};
    for (int64_t i = count / kLanes * kLanes; i < count; ++i) {
        const float d = to_float(x[i]) - center;
        sums.first += d;
        sums.second += static_cast<double>(d) * d;
    }
    return sums;
}

template <class T>
DeviationSums deviation_sums(const T* x, int64_t count, float center) {
    f32v first, second;
    vector_sums(x, count, center, first, second);
    DeviationSums sums = tail_sums(x, count, center);
    sums.first += sum(first);
    sums.second += sum(second);
    return sums;
}

// How many of the first values a center is the mean of: 64, or as many as there are whole vectors.
inline int64_t center_values(int64_t count) {
    return (count < 64 ? count : 64) / kLanes * kLanes;
}

template <class T>
DIFFKERN_INLINE f32v center_sum(const T* x, int64_t values) {
    f32v total = {};
    for (int64_t i = 0; i < values; i += kLanes) total += load(x + i);
    return total;
}

// The mean of the first few values; of one where there is no whole vector.
template <class T>
float first_center(const T* x, int64_t count) {
    const int64_t values = center_values(count);
    return values == 0 ? to_float(x[0]) : sum(center_sum(x, values)) / static_cast<float>(values);
}

inline bool is_far(double first, double second, double one_over_n) {
    return first * first * one_over_n > kFar * second;
}

// Adds the moments of x + offset.
template <class T>
void add_moments(const T* x, int64_t count, double offset, Moments& moments) {
    for (int64_t start = 0; start < count; start += kBlock) {
        const int64_t size = start + kBlock < count ? kBlock : count - start;
        const double n = static_cast<double>(size), one_over_n = 1.0 / n;
        float center = first_center(x + start, size);
        DeviationSums sums = deviation_sums(x + start, size, center);
        if (is_far(sums.first, sums.second, one_over_n)) {
            center = static_cast<float>(center + sums.first * one_over_n);
            sums = deviation_sums(x + start, size, center);
        }
        const double error = sums.first * one_over_n;
        const double m2 = sums.second - sums.first * error;
        moments.merge(n, center + error + offset, m2 < 0 ? 0 : m2);
    }
}

// A value of each of four channels.
typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));

DIFFKERN_INLINE f32x4 sums_of(const f32v* v) {
    f32x4 sums;
    sum_each(v, reinterpret_cast<float*>(&sums));
    return sums;
}

// The same for four channels of `count` <= kBlock values, each with its own offset. Small channels have as much to do
// for adding up lanes and joining as for reading: here four share it.
template <class T>
void add_four_moments(const T* x, int64_t count, const float* offset, Moments& moments) {
    const double n = static_cast<double>(count), one_over_n = 1.0 / n;
    const int64_t values = center_values(count);
    f32v vectors[4], squares[4];
    f32x4 center, vector, square, offsets;
    for (int k = 0; k < 4; ++k) vectors[k] = center_sum(x + k * count, values);
    center = sums_of(vectors) * (1.0f / static_cast<float>(values > 0 ? values : 1));
    for (int k = 0; k < 4; ++k) {
        if (values == 0) center[k] = to_float(x[k * count]);
        vector_sums(x + k * count, count, center[k], vectors[k], squares[k]);
    }
    vector = sums_of(vectors);
    square = sums_of(squares);
    __builtin_memcpy(&offsets, offset, sizeof offsets);
    f64x4 first = __builtin_convertvector(vector, f64x4), second = __builtin_convertvector(square, f64x4);
    for (int k = 0; count % kLanes != 0 && k < 4; ++k) {
        const DeviationSums tail = tail_sums(x + k * count, count, center[k]);
        first[k] += tail.first;
        second[k] += tail.second;
    }
    const auto far = first * first * one_over_n > second * static_cast<double>(kFar);
    for (int k = 0; (far[0] | far[1] | far[2] | far[3]) && k < 4; ++k) {
        center[k] = static_cast<float>(center[k] + first[k] * one_over_n);
        const DeviationSums sums = deviation_sums(x + k * count, count, center[k]);
        first[k] = sums.first;
        second[k] = sums.second;
    }
    const f64x4 error = first * one_over_n, rest = second - first * error;
    const f64x4 mean = __builtin_convertvector(center, f64x4) + error + __builtin_convertvector(offsets, f64x4);
    const f64x4 m2 = rest < 0.0 ? f64x4{} : rest, d = mean - mean[0], d2 = d * d;
    const double total = d[1] + d[2] + d[3], spread = d2[1] + d2[2] + d2[3] - total * total * 0.25;
    moments.merge(4 * n, mean[0] + total * 0.25, (m2[0] + m2[1]) + (m2[2] + m2[3]) + n * spread);
}

// A slab's place, and gamma', beta' and the offsets of its channels (null without offset).
struct Slab {
    int64_t sample, group;
    const float *gamma, *beta, *offset;
};

// The slab `by` further on in the same sample.
inline Slab next(const Slab& slab, int64_t by, int64_t channels) {
    return {slab.sample, slab.group + by, slab.gamma + by * channels, slab.beta + by * channels,
            slab.offset ? slab.offset + by * channels : nullptr};
}

// Where a channel of a sample begins, in one of two tensors: x and skip, or dx and dskip.
template <class T, class Byte>
T* channel_of(const GroupNormArgs& args, Byte* x, Byte* skip, int64_t sample, int64_t channel) {
    const bool of_x = channel < args.x_channels;
    const int64_t channels = of_x ? args.x_channels : args.shape.channels - args.x_channels;
    const int64_t index = sample * channels + (of_x ? channel : channel - args.x_channels);
    return reinterpret_cast<T*>(of_x ? x : skip) + index * args.shape.pixels;
}

// The end of the channels that lie one after the other in one tensor, from `channel` to `end` at most.
inline int64_t run_end(const GroupNormArgs& args, int64_t channel, int64_t end) {
    return channel < args.x_channels && args.x_channels < end ? args.x_channels : end;
}

template <class T>
Moments slab_statistics(const GroupNormArgs& args, const Slab& slab) {
    const int64_t channels = args.shape.channels / args.num_groups;
    const int64_t first = slab.group * channels, end = first + channels;
    const int64_t pixels = args.shape.pixels;
    Moments moments;
    for (int64_t c = first, next; c < end; c = next) {
        next = run_end(args, c, end);
        const T* x = channel_of<const T>(args, args.x, args.skip, slab.sample, c);
        if (!slab.offset) {
            add_moments(x, (next - c) * pixels, 0, moments);
            continue;
        }
        const float* offset = slab.offset + (c - first);
        for (; pixels <= kBlock && c + 4 <= next; c += 4, x += 4 * pixels, offset += 4)
            add_four_moments(x, pixels, offset, moments);
        for (; c < next; ++c, x += pixels, ++offset) add_moments(x, pixels, *offset, moments);
    }
    return moments;
}

// `ahead`: how far behind a value in memory the one lies that the next statistics want (kAhead).
template <class T, bool kSilu>
void slab_apply(const GroupNormArgs& args, const Slab& slab, const Moments& moments, int64_t ahead) {
    const int64_t channels = args.shape.channels / args.num_groups, pixels = args.shape.pixels;
    const int64_t index = slab.sample * args.num_groups + slab.group, first = slab.group * channels;
    T* y = reinterpret_cast<T*>(args.y) + index * channels * pixels;
    const auto rstd = static_cast<float>(moments.rstd(args.eps));
    Split mean(moments.mean);
    if (args.mean) {
        args.mean[index] = mean.value;
        args.rstd[index] = rstd;
    }
    for (int64_t c = 0, end; c < channels; c = end) {
        end = run_end(args, first + c, first + channels) - first;
        const T* x = channel_of<const T>(args, args.x, args.skip, slab.sample, first + c);
        for (int64_t k = c; k < end; ++k, x += pixels, y += pixels) {
            if (slab.offset) mean = Split(moments.mean - slab.offset[k]);
            const float m = mean.value, a = rstd * slab.gamma[k], b = slab.beta[k] - mean.rest * a;
            for_lanes(0, pixels, [&](int64_t i, int n) DIFFKERN_LAMBDA {
                __builtin_prefetch(x + i + ahead, 0, 2);
                store_n(y + i, activate<kSilu>((load_n(x + i, n) - m) * a + b), n);
            });
        }
    }
}

// Small slabs in batches that stay in the first-level cache: the sums of one do not wait for those of another, but its
// output waits for its own.
template <class T, bool kSilu>
void slabs_forward(const GroupNormArgs& args, const Slab& first, int64_t count) {
    constexpr int64_t kBatch = 16;
    const int64_t channels = args.shape.channels / args.num_groups, size = channels * args.shape.pixels;
    const int64_t fitting = kBlock / size < 1 ? 1 : kBlock / size, batch = fitting < kBatch ? fitting : kBatch;
    const int64_t ahead = batch * size <= kAhead ? batch * size : 0;
    Moments moments[kBatch];
    for (int64_t start = 0; start < count; start += batch) {
        const int64_t end = start + batch < count ? start + batch : count;
        for (int64_t k = start; k < end; ++k) moments[k - start] = slab_statistics<T>(args, next(first, k, channels));
        for (int64_t k = start; k < end; ++k)
            slab_apply<T, kSilu>(args, next(first, k, channels), moments[k - start], ahead);
    }
}

// Slabs are small at the bottom of a U-Net: a task takes as many as make some 16 K values, and reads the parameters of
// all its slabs of a sample at once. Runs fn(first slab, how many).
template <class Fn>
void for_each_slab(const GroupNormArgs& args, Fn fn) {
    const int64_t slabs = args.shape.samples * args.num_groups, channels = args.shape.channels / args.num_groups;
    const int64_t size = channels * args.shape.pixels;
    const int64_t of_task = 16384 / size + 1;
    auto body = [&](int64_t task) {
        const int64_t last = (task + 1) * of_task < slabs ? (task + 1) * of_task : slabs;
        Scratch<float> affine(3 * of_task * channels);
        for (int64_t i = task * of_task; i < last;) {
            const int64_t sample = i / args.num_groups, first = i % args.num_groups;
            const int64_t here = args.num_groups - first < last - i ? args.num_groups - first : last - i;
            float *gamma = affine, *beta = gamma + here * channels, *offset = beta + here * channels;
            affine_row(args, sample, first * channels, here * channels, gamma, beta);
            if (args.offset) load_row(args.offset, sample, first * channels, here * channels, 0.0f, offset);
            fn({sample, first, gamma, beta, args.offset ? offset : nullptr}, here);
            i += here;
        }
    };
    parallel_for((slabs + of_task - 1) / of_task, args.num_threads, body);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
