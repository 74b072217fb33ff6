// The backward pass of group_norm on channels-last tensors, in the three phases of group_norm_channels_last.h: sums of
// every chunk, the joined means of the sample, and dx. Reads x and dy, writes dx: 12 bytes an element in float32.
#pragma once

#include "cpu/group_norm_channels_last.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// gamma', beta', mean and rstd per channel, for the backward pass.
inline void sample_parameters(const GroupNormArgs& args, int64_t sample, ChannelSums& sums) {
    const int64_t per_group = args.shape.channels / args.num_groups;
    affine_row(args, sample, 0, args.shape.channels, sums.of(0), sums.of(1));
    for (int64_t group = 0; group < args.num_groups; ++group)
        for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
            sums.of(2)[c] = args.mean[sample * args.num_groups + group];
            sums.of(3)[c] = args.rstd[sample * args.num_groups + group];
        }
}

template <class T, bool kSilu>
void chunk_gradient_sums(const GroupNormBackwardArgs& args, int64_t sample, int64_t chunk, ChannelSums& sums) {
    const int64_t channels = args.forward.shape.channels, base = sample * args.forward.shape.pixels * channels;
    const T* x = reinterpret_cast<const T*>(args.forward.x) + base;
    const T* dy = reinterpret_cast<const T*>(args.dy) + base;
    T* dx = reinterpret_cast<T*>(args.dx) + base;
    const int64_t first = sums.chunks.first(chunk), end = sums.chunks.end(chunk, args.forward.shape);
    float *total = sums.row(chunk, 0), *total_d = sums.row(chunk, 1);
    const float *gamma = sums.of(0), *beta = sums.of(1), *mean = sums.of(2), *rstd = sums.of(3);
    for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
        const f32v a = load_n(gamma + c, n) * load_n(rstd + c, n), b = load_n(beta + c, n), m = load_n(mean + c, n);
        f32v acc = {}, acc_d = {};
        for (int64_t p = first; p < end; ++p) {
            const f32v d = load_n(x + p * channels + c, n) - m;
            const f32v dz = activation_backward<kSilu>(d * a + b, load_n(dy + p * channels + c, n));
            acc += dz;
            acc_d += dz * d;
            if (sizeof(T) == 4) store_n(dx + p * channels + c, dz, n);  // kept for the second look
        }
        store_n(total + c, acc, n);
        store_n(total_d + c, acc_d, n);
    });
}

// Joins the chunks; leaves per channel the constant of dx and the factor of x_hat in it in the first chunk's rows.
inline void sample_gradient_means(const GroupNormBackwardArgs& args, int64_t sample, ChannelSums& sums) {
    using Wide = Vec<double>;
    const GroupNormArgs& fwd = args.forward;
    const int64_t channels = fwd.shape.channels, per_group = channels / fwd.num_groups;
    double *total = sums.joined, *total_xhat = total + channels;
    float *out = args.sum_dz + sample * channels, *out_xhat = args.sum_dz_xhat + sample * channels;
    for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
        Wide dz = {}, dz_d = {};
        for (int64_t chunk = 0; chunk < sums.chunks.count; ++chunk) {
            dz += __builtin_convertvector(load_n(sums.row(chunk, 0) + c, n), Wide);
            dz_d += __builtin_convertvector(load_n(sums.row(chunk, 1) + c, n), Wide);
        }
        const Wide dz_xhat = dz_d * __builtin_convertvector(load_n(sums.of(3) + c, n), Wide);
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
        const double factor = -one_over_size * sums.of(3)[first];
        for (int64_t c = first; c < first + per_group; ++c) {
            sums.row(0, 0)[c] = static_cast<float>(dz * factor);
            sums.row(0, 1)[c] = static_cast<float>(dz_xhat * factor);
        }
    }
}

template <class T, bool kSilu>
void chunk_dx(const GroupNormBackwardArgs& args, int64_t sample, int64_t chunk, ChannelSums& sums) {
    const int64_t channels = args.forward.shape.channels, base = sample * args.forward.shape.pixels * channels;
    const T* x = reinterpret_cast<const T*>(args.forward.x) + base;
    const T* dy = reinterpret_cast<const T*>(args.dy) + base;
    T* dx = reinterpret_cast<T*>(args.dx) + base;
    const float *gamma = sums.of(0), *beta = sums.of(1), *mean = sums.of(2), *rstd = sums.of(3);
    const float *constant = sums.row(0, 0), *of_xhat = sums.row(0, 1);
    const int64_t first = sums.chunks.first(chunk), end = sums.chunks.end(chunk, args.forward.shape);
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
                const f32v dz =
                    sizeof(T) == 4 ? load_n(dx + i, n) : activation_backward<kSilu>(d * a[v] + b[v], load_n(dy + i, n));
                store_n(dx + i, dz * a[v] + (d * r[v] * factor[v] + k[v]), n);
            }
    });
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
