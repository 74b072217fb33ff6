// The backward pass of group_norm on channels-last tensors, in the three phases of group_norm_channels_last.h: sums of
// every chunk, the joined means of the sample, and dx. Reads x and dy, writes dx: 12 bytes an element in float32.
#pragma once

#include "cpu/group_norm_channels_last.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// gamma', beta', mean, rstd and what the mean leaves, per channel, for the backward pass. Without an offset the mean is
// the float that the forward pass left; with one it takes two floats, and the second is taken out of beta' and the
// sums.
inline void sample_parameters(const GroupNormArgs& args, int64_t sample, ChannelSums& sums) {
    const int64_t per_group = args.shape.channels / args.num_groups;
    affine_row(args, sample, 0, args.shape.channels, sums.of(0), sums.of(1));
    float* rest = sums.of(4);
    load_row(args.offset, sample, 0, args.shape.channels, 0.0f, rest);
    for (int64_t group = 0; group < args.num_groups; ++group) {
        const float mean = args.mean[sample * args.num_groups + group];
        const float rstd = args.rstd[sample * args.num_groups + group];
        for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
            sums.of(2)[c] = mean;
            sums.of(3)[c] = rstd;
            if (!args.offset) continue;
            const Split split(static_cast<double>(mean) - rest[c]);
            sums.of(1)[c] -= split.rest * (sums.of(0)[c] * rstd);
            sums.of(2)[c] = split.value;
            rest[c] = split.rest;
        }
    }
}

// kOffset: the gradient of the offset is wanted.
template <class T, bool kSilu, bool kOffset>
void chunk_gradient_sums(const GroupNormBackwardArgs& args, int64_t sample, int64_t chunk, ChannelSums& sums) {
    const SampleShape& shape = args.forward.shape;
    const int64_t first = sums.chunks.first(chunk), end = sums.chunks.end(chunk, shape);
    for (int which = 0; which < 2; ++which) {
        const Input in = input(args.forward, which);
        const int64_t channels = in.channels, base = sample * shape.pixels * channels;
        const T* x = reinterpret_cast<const T*>(in.data) + base;
        const T* dy = reinterpret_cast<const T*>(args.dy) + sample * shape.pixels * shape.channels + in.first;
        T* dx = reinterpret_cast<T*>(which ? args.dskip : args.dx) + base;
        for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
            const int64_t i = in.first + c;
            const f32v a = load_n(sums.of(0) + i, n) * load_n(sums.of(3) + i, n), b = load_n(sums.of(1) + i, n);
            const f32v m = load_n(sums.of(2) + i, n);
            f32v acc = {}, acc_d = {}, only_d = {};
            for (int64_t p = first; p < end; ++p) {
                const f32v d = load_n(x + p * channels + c, n) - m;
                const f32v dz = activation_backward<kSilu>(d * a + b, load_n(dy + p * shape.channels + c, n));
                acc += dz;
                acc_d += dz * d;
                if (kOffset) only_d += d;
                if (sizeof(T) == 4) store_n(dx + p * channels + c, dz, n);  // kept for the second look
            }
            store_n(sums.row(chunk, 0) + i, acc, n);
            store_n(sums.row(chunk, 1) + i, acc_d, n);
            if (kOffset) store_n(sums.row(chunk, 2) + i, only_d, n);
        });
    }
}

// Joins the chunks; leaves per channel the constant of dx and the factor of x_hat in it in the first chunk's rows, and
// the gradient of the offset, which is the sum over the pixels of the dx that they give.
inline void sample_gradient_means(const GroupNormBackwardArgs& args, int64_t sample, ChannelSums& sums) {
    using Wide = Vec<double>;
    const GroupNormArgs& fwd = args.forward;
    const int64_t channels = fwd.shape.channels, per_group = channels / fwd.num_groups;
    double *total = sums.joined, *total_xhat = total + channels;
    float *out = args.sum_dz + sample * channels, *out_xhat = args.sum_dz_xhat + sample * channels;
    float* doffset = args.doffset ? args.doffset + sample * channels : nullptr;
    const auto pixels = static_cast<double>(fwd.shape.pixels);
    for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
        Wide dz = {}, dz_d = {}, only_d = {};
        for (int64_t chunk = 0; chunk < sums.chunks.count; ++chunk) {
            dz += __builtin_convertvector(load_n(sums.row(chunk, 0) + c, n), Wide);
            dz_d += __builtin_convertvector(load_n(sums.row(chunk, 1) + c, n), Wide);
            if (doffset) only_d += __builtin_convertvector(load_n(sums.row(chunk, 2) + c, n), Wide);
        }
        const Wide rest = __builtin_convertvector(load_n(sums.of(4) + c, n), Wide);
        if (doffset) store_n(doffset + c, __builtin_convertvector(only_d - rest * pixels, f32v), n);
        const Wide dz_xhat = (dz_d - rest * dz) * __builtin_convertvector(load_n(sums.of(3) + c, n), Wide);
        store_n(total + c, dz, n);
        store_n(total_xhat + c, dz_xhat, n);
        store_n(out + c, __builtin_convertvector(dz, f32v), n);
        store_n(out_xhat + c, __builtin_convertvector(dz_xhat, f32v), n);
    });
    const double one_over_size = 1.0 / static_cast<double>(per_group * fwd.shape.pixels);
    for (int64_t group = 0; group < fwd.num_groups; ++group) {
        const int64_t first = group * per_group;
        double dz = 0, dz_xhat = 0;
        for (int64_t c = first; c < first + per_group; ++c) {
            dz += sums.of(0)[c] * total[c];
            dz_xhat += sums.of(0)[c] * total_xhat[c];
        }
        const double rstd = sums.of(3)[first], constant = -one_over_size * rstd * dz;
        const double of_xhat = -one_over_size * rstd * dz_xhat, of_d = rstd * of_xhat;
        for (int64_t c = first; c < first + per_group; ++c) {
            sums.row(0, 0)[c] = static_cast<float>(constant - sums.of(4)[c] * of_d);
            sums.row(0, 1)[c] = static_cast<float>(of_xhat);
            if (doffset)
                doffset[c] =
                    static_cast<float>(total[c] * sums.of(0)[c] * rstd + doffset[c] * of_d + pixels * constant);
        }
    }
}

template <class T, bool kSilu>
void chunk_dx(const GroupNormBackwardArgs& args, int64_t sample, int64_t chunk, ChannelSums& sums) {
    const SampleShape& shape = args.forward.shape;
    const int64_t first = sums.chunks.first(chunk), end = sums.chunks.end(chunk, shape);
    for (int which = 0; which < 2; ++which) {
        const Input in = input(args.forward, which);
        const int64_t channels = in.channels, base = sample * shape.pixels * channels;
        const T* x = reinterpret_cast<const T*>(in.data) + base;
        const T* dy = reinterpret_cast<const T*>(args.dy) + sample * shape.pixels * shape.channels + in.first;
        T* dx = reinterpret_cast<T*>(which ? args.dskip : args.dx) + base;
        const float *gamma = sums.of(0) + in.first, *beta = sums.of(1) + in.first;
        const float *mean = sums.of(2) + in.first, *rstd = sums.of(3) + in.first;
        const float *constant = sums.row(0, 0) + in.first, *of_xhat = sums.row(0, 1) + in.first;
        for_channel_columns(channels, [&](int64_t c, int vectors, int n) DIFFKERN_LAMBDA {
            f32v r[kVectors], a[kVectors], b[kVectors], m[kVectors], factor[kVectors], k[kVectors];
            for (int v = 0; v < vectors; ++v) {
                const int64_t i = c + v * kLanes;
                r[v] = load_n(rstd + i, n);
                a[v] = load_n(gamma + i, n) * r[v];
                b[v] = load_n(beta + i, n);
                m[v] = load_n(mean + i, n);
                factor[v] = load_n(of_xhat + i, n);
                k[v] = load_n(constant + i, n);
            }
            for (int64_t p = first; p < end; ++p)
                for (int v = 0; v < vectors; ++v) {
                    const int64_t i = p * channels + c + v * kLanes;
                    const f32v d = load_n(x + i, n) - m[v];
                    f32v dz;
                    if (sizeof(T) == 4)
                        dz = load_n(dx + i, n);
                    else
                        dz = activation_backward<kSilu>(d * a[v] + b[v],
                                                        load_n(dy + p * shape.channels + c + v * kLanes, n));
                    store_n(dx + i, dz * a[v] + (d * r[v] * factor[v] + k[v]), n);
                }
        });
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
