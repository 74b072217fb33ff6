// group_norm on channels-last tensors: a sample is pixels x channels with the channels next to each other, so the
// statistics are kept per channel, a vector of channels at a time, and joined per group at the end. x and skip are two
// blocks of such columns.
//
// A sample is cut into chunks of pixels that fit the first-level cache. Three phases: moments of every chunk, the
// joined affine of the sample, and its application; with at least as many samples as threads a task runs all three on
// one sample (its second look finds the data in the second-level cache), otherwise chunks are the tasks. Both orders do
// the same arithmetic. Bytes as in the contiguous kernel.
#pragma once

#include "cpu/group_norm_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr int kVectors = 4;  // channel vectors whose coefficients stay in registers down a column of pixels

struct PixelChunks {
    int64_t pixels, count;  // pixels a chunk, chunks a sample

    explicit PixelChunks(const SampleShape& shape) {
        pixels = 8192 / shape.channels;
        if (pixels < 8) pixels = 8;
        if (pixels > 128) pixels = 128;  // sums down a column are in float32: they stay short
        count = (shape.pixels + pixels - 1) / pixels;
    }
    int64_t first(int64_t chunk) const {
        return chunk * pixels;
    }
    int64_t end(int64_t chunk, const SampleShape& shape) const {
        return (chunk + 1) * pixels < shape.pixels ? (chunk + 1) * pixels : shape.pixels;
    }
};

// One of the two inputs of a sample: `channels` columns, the first of which is column `first` of the result.
struct Input {
    int64_t first, channels;
    const char* data;
};

inline Input input(const GroupNormArgs& args, int which) {
    if (which == 0) return {0, args.x_channels, args.x};
    return {args.x_channels, args.shape.channels - args.x_channels, args.skip};
}

// Three float rows of C a chunk (forward: center, mean - center, M2; backward: the sums), and what the phases hand on
// per channel.
struct ChannelSums {
    PixelChunks chunks;
    int64_t channels;
    Scratch<float> partial;  // (chunks, 3, C)
    Scratch<float> affine;   // (5, C)
    Scratch<double> joined;  // (2, C)

    explicit ChannelSums(const SampleShape& shape)
        : chunks(shape),
          channels(shape.channels),
          partial(chunks.count * 3 * channels),
          affine(5 * channels),
          joined(2 * channels) {
    }

    float* row(int64_t chunk, int which) {
        return partial + (chunk * 3 + which) * channels;
    }
    float* of(int which) {
        return affine + which * channels;
    }
};

// Runs fn(c, vectors, lanes of the last one) over the channels, kVectors at a time and then one by one.
template <class Fn>
DIFFKERN_INLINE void for_channel_columns(int64_t channels, Fn fn) {
    int64_t c = 0;
    for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) fn(c, kVectors, kLanes);
    for_lanes(c, channels, [&](int64_t i, int n) DIFFKERN_LAMBDA { fn(i, 1, n); });
}

// Sums of d and d^2 down `vectors` columns of pixels, d = x - center.
template <class T>
DIFFKERN_INLINE void column_sums(const T* x, int64_t pixels, int64_t stride, int vectors, int n, const f32v* center,
                                 f32v* rest, f32v* square) {
    for (int v = 0; v < vectors; ++v) rest[v] = square[v] = f32v{};
    for (int64_t p = 0; p < pixels; ++p)
        for (int v = 0; v < vectors; ++v) {
            const f32v d = load_n(x + p * stride + v * kLanes, n) - center[v];
            rest[v] += d;
            square[v] += d * d;
        }
}

template <class T>
void chunk_moments(const GroupNormArgs& args, int64_t sample, int64_t chunk, ChannelSums& sums) {
    const int64_t first = sums.chunks.first(chunk), pixels = sums.chunks.end(chunk, args.shape) - first;
    const float one_over_n = 1.0f / static_cast<float>(pixels);
    const int64_t first_pixels = pixels < 8 ? pixels : 8;
    const float one_over_first = 1.0f / static_cast<float>(first_pixels);
    for (int which = 0; which < 2; ++which) {
        const Input in = input(args, which);
        const int64_t channels = in.channels;
        const T* x = reinterpret_cast<const T*>(in.data) + (sample * args.shape.pixels + first) * channels;
        float* centers = sums.row(chunk, 0) + in.first;
        float *errors = sums.row(chunk, 1) + in.first, *m2s = sums.row(chunk, 2) + in.first;
        for_channel_columns(channels, [&](int64_t c, int vectors, int n) DIFFKERN_LAMBDA {
            f32v center[kVectors], rest[kVectors], square[kVectors];
            for (int v = 0; v < vectors; ++v) {
                center[v] = f32v{};
                for (int64_t p = 0; p < first_pixels; ++p) center[v] += load_n(x + p * channels + c + v * kLanes, n);
                center[v] *= one_over_first;
            }
            column_sums(x + c, pixels, channels, vectors, n, center, rest, square);
            bool again = false;
            for (int v = 0; v < vectors; ++v) again |= any(rest[v] * rest[v] * one_over_n > kFar * square[v]);
            if (again) {
                for (int v = 0; v < vectors; ++v) center[v] += rest[v] * one_over_n;
                column_sums(x + c, pixels, channels, vectors, n, center, rest, square);
            }
            for (int v = 0; v < vectors; ++v) {
                const f32v error = rest[v] * one_over_n;
                const f32v m2 = square[v] - error * rest[v];
                store_n(centers + c + v * kLanes, center[v], n);  // apart: their sum would round
                store_n(errors + c + v * kLanes, error, n);
                store_n(m2s + c + v * kLanes, m2 < 0.0f ? broadcast(0.0f) : m2, n);
            }
        });
    }
}

// Joins the chunks of every channel, with the first chunk's center as the shift; leaves mean and M2 per channel.
inline void join_chunks(const GroupNormArgs& args, ChannelSums& sums, double* mean, double* m2) {
    using Wide = Vec<double>;
    const double one_over_n = 1.0 / static_cast<double>(args.shape.pixels);
    for_lanes(0, sums.channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
        const f32v shift = load_n(sums.row(0, 0) + c, n);
        Wide first = {}, second = {};
        for (int64_t chunk = 0; chunk < sums.chunks.count; ++chunk) {
            const auto count = static_cast<double>(sums.chunks.end(chunk, args.shape) - sums.chunks.first(chunk));
            const Wide d = __builtin_convertvector(load_n(sums.row(chunk, 0) + c, n) - shift, Wide) +
                           __builtin_convertvector(load_n(sums.row(chunk, 1) + c, n), Wide);
            first += count * d;
            second += count * d * d + __builtin_convertvector(load_n(sums.row(chunk, 2) + c, n), Wide);
        }
        store_n(mean + c, __builtin_convertvector(shift, Wide) + first * one_over_n, n);
        store_n(m2 + c, second - first * first * one_over_n, n);
    });
}

// Joins chunks and channels per group; leaves a, b and the mean per channel: y = act((x - mean) a + b).
inline void sample_affine(const GroupNormArgs& args, int64_t sample, ChannelSums& sums) {
    const int64_t per_group = args.shape.channels / args.num_groups;
    const double pixels = static_cast<double>(args.shape.pixels);
    const double one_over_channels = 1.0 / static_cast<double>(per_group);
    const double one_over_size = one_over_channels / pixels;
    affine_row(args, sample, 0, args.shape.channels, sums.of(0), sums.of(1));
    join_chunks(args, sums, sums.joined, sums.joined + args.shape.channels);
    double *means = sums.joined, *m2s = means + args.shape.channels;
    const float* offset = sums.of(2);
    if (args.offset) {
        load_row(args.offset, sample, 0, args.shape.channels, 0.0f, sums.of(2));
        for (int64_t c = 0; c < args.shape.channels; ++c) means[c] += offset[c];
    }
    for (int64_t group = 0; group < args.num_groups; ++group) {
        const int64_t first = group * per_group;
        double mean = 0, m2 = 0, spread = 0;  // of a group's channels, which have equal counts
        for (int64_t c = first; c < first + per_group; ++c) {
            mean += means[c];
            m2 += m2s[c];
        }
        mean *= one_over_channels;
        for (int64_t c = first; c < first + per_group; ++c) spread += (means[c] - mean) * (means[c] - mean);
        const double variance = (m2 + pixels * spread) * one_over_size;
        const auto rstd = static_cast<float>(1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + args.eps));
        Split split(mean);
        if (args.mean) {
            args.mean[sample * args.num_groups + group] = split.value;
            args.rstd[sample * args.num_groups + group] = rstd;
        }
        for (int64_t c = first; c < first + per_group; ++c) {
            if (args.offset) split = Split(mean - offset[c]);
            sums.of(0)[c] *= rstd;
            sums.of(1)[c] -= split.rest * sums.of(0)[c];
            sums.of(2)[c] = split.value;
        }
    }
}

template <class T, bool kSilu>
void chunk_apply(const GroupNormArgs& args, int64_t sample, int64_t chunk, ChannelSums& sums) {
    const int64_t out_channels = args.shape.channels;
    const int64_t first = sums.chunks.first(chunk), end = sums.chunks.end(chunk, args.shape);
    for (int which = 0; which < 2; ++which) {
        const Input in = input(args, which);
        const T* x = reinterpret_cast<const T*>(in.data) + sample * args.shape.pixels * in.channels;
        T* y = reinterpret_cast<T*>(args.y) + sample * args.shape.pixels * out_channels + in.first;
        const float *of_d = sums.of(0) + in.first, *constant = sums.of(1) + in.first, *mean = sums.of(2) + in.first;
        for_channel_columns(in.channels, [&](int64_t c, int vectors, int n) DIFFKERN_LAMBDA {
            f32v a[kVectors], b[kVectors], m[kVectors];
            for (int v = 0; v < vectors; ++v) {
                const int64_t i = c + v * kLanes;
                a[v] = load_n(of_d + i, n);
                b[v] = load_n(constant + i, n);
                m[v] = load_n(mean + i, n);
            }
            for (int64_t p = first; p < end; ++p)
                for (int v = 0; v < vectors; ++v) {
                    const int64_t i = c + v * kLanes;
                    const f32v d = load_n(x + p * in.channels + i, n) - m[v];
                    store_n(y + p * out_channels + i, activate<kSilu>(d * a[v] + b[v]), n);
                }
        });
    }
}

// Runs prepare(sample), first(sample, chunk), join(sample), second(sample, chunk) in that order for every sample.
template <class Prepare, class First, class Join, class Second>
void for_each_sample(const SampleShape& shape, int num_threads, Prepare prepare, First first, Join join,
                     Second second) {
    if (shape.samples >= num_threads) {
        auto body = [&](int64_t sample) {
            ChannelSums sums(shape);
            prepare(sample, sums);
            for (int64_t chunk = 0; chunk < sums.chunks.count; ++chunk) first(sample, chunk, sums);
            join(sample, sums);
            for (int64_t chunk = 0; chunk < sums.chunks.count; ++chunk) second(sample, chunk, sums);
        };
        parallel_for(shape.samples, num_threads, body);
        return;
    }
    for (int64_t sample = 0; sample < shape.samples; ++sample) {
        ChannelSums sums(shape);
        prepare(sample, sums);
        auto first_chunk = [&](int64_t chunk) { first(sample, chunk, sums); };
        auto second_chunk = [&](int64_t chunk) { second(sample, chunk, sums); };
        parallel_for(sums.chunks.count, num_threads, first_chunk);
        join(sample, sums);
        parallel_for(sums.chunks.count, num_threads, second_chunk);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
