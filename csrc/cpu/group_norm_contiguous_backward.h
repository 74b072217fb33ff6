// The backward pass of group_norm on contiguous tensors, a slab at a time: sums of each channel, then dx. Reads x and
// dy, writes dx: 12 bytes an element in float32.
#pragma once

#include "cpu/group_norm_contiguous.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// Where a channel's values lie, and its coefficients: d = x - mean, z = d a + beta. Without an offset the mean is the
// float that the forward pass left; with one it takes two floats, and the second is taken out of sums and constants.
template <class T>
struct BackwardChannel {
    const T *x, *dy;
    T* dx;
    float mean, rest = 0, a, beta;

    BackwardChannel(const GroupNormBackwardArgs& args, const Slab& slab, int64_t c) {
        const GroupNormArgs& fwd = args.forward;
        const int64_t group = slab.sample * fwd.num_groups + slab.group;
        const int64_t channel = slab.group * (fwd.shape.channels / fwd.num_groups) + c;
        x = channel_of<const T>(fwd, fwd.x, fwd.skip, slab.sample, channel);
        dy = reinterpret_cast<const T*>(args.dy) + (slab.sample * fwd.shape.channels + channel) * fwd.shape.pixels;
        dx = channel_of<T>(fwd, args.dx, args.dskip, slab.sample, channel);
        mean = fwd.mean[group];
        a = slab.gamma[c] * fwd.rstd[group];
        beta = slab.beta[c];
        if (!slab.offset) return;
        const Split split(static_cast<double>(mean) - slab.offset[c]);
        mean = split.value;
        rest = split.rest;
        beta -= rest * a;
    }
};

// kOffset: the gradient of the offset is wanted.
template <class T, bool kSilu, bool kOffset>
void slab_backward(const GroupNormBackwardArgs& args, const Slab& slab) {
    const GroupNormArgs& fwd = args.forward;
    const int64_t channels = fwd.shape.channels / fwd.num_groups, pixels = fwd.shape.pixels;
    const int64_t index = slab.sample * fwd.num_groups + slab.group;
    const float rstd = fwd.rstd[index];

    // Sums of dz, of dz d and of d over [start, end) of a channel; dz is kept in dx for the second look.
    const auto sums = [&](const BackwardChannel<T>& of, int64_t start, int64_t end, f32v& acc, f32v& acc_d,
                          f32v& only_d) DIFFKERN_LAMBDA {
        const float mean = of.mean, a = of.a, beta = of.beta;
        acc = acc_d = only_d = f32v{};
        for_lanes(start, end, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            // A partial piece of dy is filled up with zeros, so its missing lanes add nothing (unless mean or rstd is
            // NaN, and then the sums are NaN by right).
            const f32v d = load_n(of.x + i, n) - mean;
            const f32v dz = activation_backward<kSilu>(d * a + beta, load_n(of.dy + i, n));
            acc += dz;
            acc_d += dz * d;
            if (kOffset) only_d += first_lanes(d, n);
            if (sizeof(T) == 4) store_n(of.dx + i, dz, n);
        });
    };
    double group_dz = 0, group_dz_d = 0;
    const auto keep = [&](int64_t c, float rest, double total, double total_d, double total_of_d) DIFFKERN_LAMBDA {
        total_d -= rest * total;
        if (kOffset)
            args.doffset[index * channels + c] = static_cast<float>(total_of_d - rest * static_cast<double>(pixels));
        args.sum_dz[index * channels + c] = static_cast<float>(total);
        args.sum_dz_xhat[index * channels + c] = static_cast<float>(total_d * rstd);
        group_dz += slab.gamma[c] * total;
        group_dz_d += slab.gamma[c] * total_d;
    };
    int64_t c = 0;
    for (; pixels <= kBlock && c + 4 <= channels; c += 4) {
        f32v acc[4], acc_d[4], only_d[4];
        float rest[4], total[4], total_d[4], total_of_d[4] = {};
        for (int k = 0; k < 4; ++k) {
            const BackwardChannel<T> of(args, slab, c + k);
            sums(of, 0, pixels, acc[k], acc_d[k], only_d[k]);
            rest[k] = of.rest;
        }
        sum_each(acc, total);
        sum_each(acc_d, total_d);
        if (kOffset) sum_each(only_d, total_of_d);
        for (int k = 0; k < 4; ++k) keep(c + k, rest[k], total[k], total_d[k], total_of_d[k]);
    }
    for (; c < channels; ++c) {
        const BackwardChannel<T> of(args, slab, c);
        double total = 0, total_d = 0, total_of_d = 0;
        for (int64_t start = 0; start < pixels; start += kBlock) {
            f32v acc, acc_d, only_d;
            sums(of, start, start + kBlock < pixels ? start + kBlock : pixels, acc, acc_d, only_d);
            total += sum(acc);
            total_d += sum(acc_d);
            if (kOffset) total_of_d += sum(only_d);
        }
        keep(c, of.rest, total, total_d, total_of_d);
    }

    if (channels * pixels == 1) {  // the normalised value is 0 whatever x is; NaN stays
        const auto zero = static_cast<float>(0 * group_dz);
        if (kOffset) args.doffset[index] = zero;
        return store_n(BackwardChannel<T>(args, slab, 0).dx, broadcast(zero), 1);
    }

    // dx = rstd (gamma' dz - mean(gamma' dz) - x_hat mean(gamma' dz x_hat)), with x_hat = d rstd
    const double of_size = rstd / static_cast<double>(channels * pixels);
    const double group_constant = -group_dz * of_size, group_of_xhat = -group_dz_d * rstd * of_size;
    const auto of_xhat = static_cast<float>(group_of_xhat);
    for (c = channels - 1; c >= 0; --c) {  // the last ones are still in the first-level cache
        const BackwardChannel<T> of(args, slab, c);
        const float mean = of.mean, a = of.a, beta = of.beta;
        const auto constant = static_cast<float>(group_constant - of.rest * (rstd * group_of_xhat));
        for_lanes(0, pixels, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            const f32v d = load_n(of.x + i, n) - mean;
            const f32v dz =
                sizeof(T) == 4 ? load_n(of.dx + i, n) : activation_backward<kSilu>(d * a + beta, load_n(of.dy + i, n));
            store_n(of.dx + i, dz * a + (d * rstd * of_xhat + constant), n);
        });
        if (kOffset) {  // the sum of the line above
            float& out = args.doffset[index * channels + c];
            const double total = args.sum_dz[index * channels + c];
            out = static_cast<float>(total * slab.gamma[c] * rstd + out * (rstd * group_of_xhat) +
                                     static_cast<double>(pixels) * group_constant);
        }
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
