// group_norm on contiguous tensors: a group of a sample is one slab of channels_per_group * pixels values. A task is a
// few slabs. Forward reads x from memory once (the second and third look at a slab find it in a cache unless it passes
// the second level) and writes y once: 8 bytes an element in float32. Backward reads x and dy and writes dx.
#pragma once

#include "cpu/group_norm_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr int64_t kBlock = 4096;  // values whose statistics are taken while they are in the first-level cache

struct DeviationSums {
    double first, second;  // of d and of d^2
};

template <class T>
DeviationSums deviation_sums(const T* x, int64_t count, float center) {
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
    DeviationSums sums = {0, 0};
    for (; i < count; ++i) {
        const float d = to_float(x[i]) - center;
        sums.first += d;
        sums.second += static_cast<double>(d) * d;
    }
    sums.first += sum((rest[0] + rest[1]) + (rest[2] + rest[3]));
    sums.second += sum((square[0] + square[1]) + (square[2] + square[3]));
    return sums;
}

// The mean of the first 64 values, or of as many as there are whole vectors; of one value where there is none.
template <class T>
float first_center(const T* x, int64_t count) {
    const int64_t values = (count < 64 ? count : 64) / kLanes * kLanes;
    if (values == 0) return to_float(x[0]);
    f32v total = {};
    for (int64_t i = 0; i < values; i += kLanes) total += load(x + i);
    return sum(total) / static_cast<float>(values);
}

template <class T>
Moments slab_moments(const T* x, int64_t count) {
    Moments moments;
    for (int64_t start = 0; start < count; start += kBlock) {
        const int64_t size = start + kBlock < count ? kBlock : count - start;
        const double n = static_cast<double>(size), one_over_n = 1.0 / n;
        float center = first_center(x + start, size);
        DeviationSums sums = deviation_sums(x + start, size, center);
        if (sums.first * sums.first * one_over_n > kFar * sums.second) {
            center = static_cast<float>(center + sums.first * one_over_n);
            sums = deviation_sums(x + start, size, center);
        }
        const double error = sums.first * one_over_n;
        const double m2 = sums.second - sums.first * error;
        moments.merge(n, center + error, m2 < 0 ? 0 : m2);
    }
    return moments;
}

// A slab's place, and gamma' and beta' of its channels.
struct Slab {
    int64_t sample, group;
    const float *gamma, *beta;
};

// The slab `by` further on in the same sample.
inline Slab next(const Slab& slab, int64_t by, int64_t channels) {
    return {slab.sample, slab.group + by, slab.gamma + by * channels, slab.beta + by * channels};
}

template <class T>
Moments slab_statistics(const GroupNormArgs& args, const Slab& slab) {
    const int64_t size = args.shape.channels / args.num_groups * args.shape.pixels;
    return slab_moments(reinterpret_cast<const T*>(args.x) + (slab.sample * args.num_groups + slab.group) * size, size);
}

template <class T, bool kSilu>
void slab_apply(const GroupNormArgs& args, const Slab& slab, const Moments& moments) {
    const int64_t channels = args.shape.channels / args.num_groups, pixels = args.shape.pixels;
    const int64_t index = slab.sample * args.num_groups + slab.group;
    const T* x = reinterpret_cast<const T*>(args.x) + index * channels * pixels;
    T* y = reinterpret_cast<T*>(args.y) + index * channels * pixels;
    const auto rstd = static_cast<float>(moments.rstd(args.eps));
    const auto mean = static_cast<float>(moments.mean);
    const auto mean_rest = static_cast<float>(moments.mean - mean);
    if (args.mean) {
        args.mean[index] = mean;
        args.rstd[index] = rstd;
    }
    for (int64_t c = 0; c < channels; ++c, x += pixels, y += pixels) {
        const float a = rstd * slab.gamma[c], b = slab.beta[c] - mean_rest * a;
        for_lanes(0, pixels, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            store_n(y + i, activate<kSilu>((load_n(x + i, n) - mean) * a + b), n);
        });
    }
}

// Small slabs in batches that stay in the first-level cache: the sums of one do not wait for those of another, but its
// output waits for its own.
template <class T, bool kSilu>
void slabs_forward(const GroupNormArgs& args, const Slab& first, int64_t count) {
    constexpr int64_t kBatch = 16;
    const int64_t channels = args.shape.channels / args.num_groups, size = channels * args.shape.pixels;
    const int64_t fitting = kBlock / size < 1 ? 1 : kBlock / size, batch = fitting < kBatch ? fitting : kBatch;
    Moments moments[kBatch];
    for (int64_t start = 0; start < count; start += batch) {
        const int64_t end = start + batch < count ? start + batch : count;
        for (int64_t k = start; k < end; ++k) moments[k - start] = slab_statistics<T>(args, next(first, k, channels));
        for (int64_t k = start; k < end; ++k) slab_apply<T, kSilu>(args, next(first, k, channels), moments[k - start]);
    }
}

template <class T, bool kSilu>
void slab_backward(const GroupNormBackwardArgs& args, const Slab& slab) {
    const GroupNormArgs& fwd = args.forward;
    const int64_t channels = fwd.shape.channels / fwd.num_groups, pixels = fwd.shape.pixels;
    const int64_t index = slab.sample * fwd.num_groups + slab.group;
    const int64_t offset = index * channels * pixels;
    const T* x = reinterpret_cast<const T*>(fwd.x) + offset;
    const T* dy = reinterpret_cast<const T*>(args.dy) + offset;
    T* dx = reinterpret_cast<T*>(args.dx) + offset;
    const float mean = fwd.mean[index], rstd = fwd.rstd[index];

    // Sums of dz and of dz d over [start, end) of channel c; dz is kept in dx for the second look.
    const auto sums = [&](int64_t c, int64_t start, int64_t end, f32v& acc, f32v& acc_d) DIFFKERN_LAMBDA {
        const int64_t base = c * pixels;
        const float a = slab.gamma[c] * rstd, beta = slab.beta[c];
        acc = acc_d = f32v{};
        for_lanes(start, end, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            // A partial piece of dy is filled up with zeros, so its missing lanes add nothing (unless mean or rstd is
            // NaN, and then the sums are NaN by right).
            const f32v d = load_n(x + base + i, n) - mean;
            const f32v dz = activation_backward<kSilu>(d * a + beta, load_n(dy + base + i, n));
            acc += dz;
            acc_d += dz * d;
            if (sizeof(T) == 4) store_n(dx + base + i, dz, n);
        });
    };
    double group_dz = 0, group_dz_d = 0;
    const auto keep = [&](int64_t c, double total, double total_d) DIFFKERN_LAMBDA {
        args.sum_dz[index * channels + c] = static_cast<float>(total);
        args.sum_dz_xhat[index * channels + c] = static_cast<float>(total_d * rstd);
        group_dz += slab.gamma[c] * total;
        group_dz_d += slab.gamma[c] * total_d;
    };
    int64_t c = 0;
    for (; pixels <= kBlock && c + 4 <= channels; c += 4) {
        f32v acc[4], acc_d[4];
        float total[4], total_d[4];
        for (int k = 0; k < 4; ++k) sums(c + k, 0, pixels, acc[k], acc_d[k]);
        sum_each(acc, total);
        sum_each(acc_d, total_d);
        for (int k = 0; k < 4; ++k) keep(c + k, total[k], total_d[k]);
    }
    for (; c < channels; ++c) {
        double total = 0, total_d = 0;
        for (int64_t start = 0; start < pixels; start += kBlock) {
            f32v acc, acc_d;
            sums(c, start, start + kBlock < pixels ? start + kBlock : pixels, acc, acc_d);
            total += sum(acc);
            total_d += sum(acc_d);
        }
        keep(c, total, total_d);
    }

    if (channels * pixels == 1)  // the normalised value is 0 whatever x is; NaN stays
        return store_n(dx, broadcast(static_cast<float>(0 * group_dz)), 1);

    // dx = rstd (gamma' dz - mean(gamma' dz) - x_hat mean(gamma' dz x_hat)), with x_hat = d rstd
    const double of_size = rstd / static_cast<double>(channels * pixels);
    const auto constant = static_cast<float>(-group_dz * of_size);
    const auto of_xhat = static_cast<float>(-group_dz_d * rstd * of_size);
    for (c = channels - 1; c >= 0; --c) {  // the last ones are still in the first-level cache
        const int64_t base = c * pixels;
        const float beta = slab.beta[c], a = slab.gamma[c] * rstd;
        for_lanes(0, pixels, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            const f32v d = load_n(x + base + i, n) - mean;
            const f32v dz = sizeof(T) == 4 ? load_n(dx + base + i, n)
                                           : activation_backward<kSilu>(d * a + beta, load_n(dy + base + i, n));
            store_n(dx + base + i, dz * a + (d * rstd * of_xhat + constant), n);
        });
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
        Scratch<float> affine(2 * of_task * channels);
        for (int64_t i = task * of_task; i < last;) {
            const int64_t sample = i / args.num_groups, first = i % args.num_groups;
            const int64_t here = args.num_groups - first < last - i ? args.num_groups - first : last - i;
            float *gamma = affine, *beta = gamma + here * channels;
            affine_row(args, sample, first * channels, here * channels, gamma, beta);
            fn({sample, first, gamma, beta}, here);
            i += here;
        }
    };
    parallel_for((slabs + of_task - 1) / of_task, args.num_threads, body);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
