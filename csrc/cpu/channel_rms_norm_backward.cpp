// The backward pass of channel_rms_norm (docs/channel_rms_norm.md). With dz the gradient before the activation and
// du = gamma dz,
//
//     dx = (du - u sum(du u)) / norm      the sum over the channels of the pixel; absent where norm < eps
//
// and the parameters' gradients come from the sums over the pixels of dz and of dz u. Reads x and dy from memory once
// and writes dx: 12 bytes an element in float32. A unit's sums stand in a place of their own and are joined in order.
#include "cpu/channel_rms_norm.h"
#include "cpu/channel_rms_norm_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {
namespace {

struct BackwardMemory {
    SampleParameters parameters;
    Scratch<float> u, du;               // a block: (C, pixels) of planes; of rows du alone, (pixels, C)
    Scratch<float> reciprocals, along;  // of a block's pixels: 1 / max(norm, eps), and sum(du u) times it
    Scratch<f32v> products;             // of a block's pixels: sum(du u) of rows before its lanes are added

    explicit BackwardMemory(const Cut& cut)
        : parameters(cut.channels),
          u(cut.rows ? 0 : cut.channels * cut.block),
          du(whole_vectors(cut.channels) * cut.block),
          reciprocals(cut.block),
          along(cut.block),
          products(cut.rows ? cut.block : 0) {
    }
};

// Sums over the pixels of a unit, per channel.
struct Sums {
    double *dz, *dz_u;
};

// Leaves 1 / max(norm, eps) of a block's pixels; 0 where there is no pixel any more.
inline void load_reciprocals(const float* norm, int64_t count, float eps, float* out) {
    for_lanes(0, count,
              [&](int64_t i, int n) DIFFKERN_LAMBDA { store(out + i, reciprocal(load_n(norm + i, n), eps)); });
    for (int64_t i = count; i < whole_vectors(count); ++i) out[i] = 0.0f;
}

// From sum(du u) to its product with the reciprocal of the norm, and 0 where the norm is a constant.
inline void finish_along(const float* norm, int64_t count, float eps, const float* r, float* along) {
    for_lanes(0, count, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const f32v product = load(along + i) * load(r + i);
        store(along + i, load_n(norm + i, n) < eps ? broadcast(0.0f) : product);
    });
}

// The first look at kChannels planes from x and dy on, which belong to channel c and those behind it.
template <int kChannels, bool kSilu, class T>
DIFFKERN_INLINE void plane_gradients(BackwardMemory& memory, const T* x, const T* dy, int64_t plane, int64_t width,
                                     int64_t c, Sums sums) {
    const int64_t stride = whole_vectors(width);
    const float *gamma = memory.parameters.gamma + c, *shift = memory.parameters.shift + c, *r = memory.reciprocals;
    float *u = memory.u + c * stride, *du = memory.du + c * stride, *along = memory.along;
    f32v total[kChannels] = {}, total_u[kChannels] = {};
    for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const f32v factor = load(r + i);
        f32v product = {};
        for (int k = 0; k < kChannels; ++k) {
            const f32v here = load_n(x + k * plane + i, n) * factor;
            const f32v dz = activation_backward<kSilu>(here * gamma[k] + shift[k], load_n(dy + k * plane + i, n));
            const f32v gradient = dz * gamma[k];
            total[k] += dz;
            total_u[k] += dz * here;
            product += gradient * here;
            store(u + k * stride + i, here);
            store(du + k * stride + i, gradient);
        }
        store(along + i, load(along + i) + product);
    });
    for (int k = 0; k < kChannels; ++k) {
        sums.dz[c + k] += sum(total[k]);
        sums.dz_u[c + k] += sum(total_u[k]);
    }
}

// `width` pixels from x, dy and dx on, of all planes.
template <class T, bool kSilu>
void planes(const ChannelRmsNormArgs& args, BackwardMemory& memory, const T* x, const T* dy, T* dx, const float* norm,
            int64_t width, Sums sums) {
    const int64_t channels = args.shape.channels, plane = args.shape.pixels, stride = whole_vectors(width);
    float *r = memory.reciprocals, *along = memory.along;
    load_reciprocals(norm, width, args.eps, r);
    for (int64_t i = 0; i < stride; ++i) along[i] = 0.0f;
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4)
        plane_gradients<4, kSilu>(memory, x + c * plane, dy + c * plane, plane, width, c, sums);
    for (; c < channels; ++c) plane_gradients<1, kSilu>(memory, x + c * plane, dy + c * plane, plane, width, c, sums);
    finish_along(norm, width, args.eps, r, along);
    for (c = 0; c < channels; ++c) {
        const float *u = memory.u + c * stride, *du = memory.du + c * stride;
        T* out = dx + c * plane;
        for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            store_n(out + i, load(du + i) * load(r + i) - load(u + i) * load(along + i), n);
        });
    }
}

// `count` pixels, all channels of each.
template <class T, bool kSilu>
void rows(const ChannelRmsNormArgs& args, BackwardMemory& memory, const T* x, const T* dy, T* dx, const float* norm,
          int64_t count, Sums sums) {
    const int64_t channels = args.shape.channels, stride = whole_vectors(channels);
    const float *gamma = memory.parameters.gamma, *shift = memory.parameters.shift;
    float *du = memory.du, *r = memory.reciprocals, *along = memory.along;
    f32v* products = memory.products;
    load_reciprocals(norm, count, args.eps, r);
    for (int64_t p = 0; p < count; ++p) products[p] = f32v{};
    for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
        const f32v a = load(gamma + c), b = load(shift + c);
        f32v total = {}, total_u = {};
        for (int64_t p = 0; p < count; ++p) {
            const f32v u = load_n(x + p * channels + c, n) * r[p];
            const f32v dz = activation_backward<kSilu>(u * a + b, load_n(dy + p * channels + c, n));
            const f32v gradient = dz * a;
            total += dz;
            total_u += dz * u;
            products[p] += gradient * u;
            store(du + p * stride + c, gradient);
        }
        store_n(sums.dz + c, load_n(sums.dz + c, n) + __builtin_convertvector(total, f64v), n);
        store_n(sums.dz_u + c, load_n(sums.dz_u + c, n) + __builtin_convertvector(total_u, f64v), n);
    });
    for (int64_t p = 0; p < count; ++p) along[p] = sum(products[p]);
    finish_along(norm, count, args.eps, r, along);
    for (int64_t p = 0; p < count; ++p, x += channels, dx += channels, du += stride) {
        const float factor = r[p], of_u = along[p];  // not multiplied: the product may leave float32
        for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
            store_n(dx + c, load(du + c) * factor - load_n(x + c, n) * factor * of_u, n);
        });
    }
}

// Joins the units' sums, which lie as (sample, unit, 2, C): N x C values, so on one thread.
void parameter_gradients(const ChannelRmsNormBackwardArgs& args, const Cut& cut, const double* sums) {
    const int64_t channels = cut.channels;
    const double root = __builtin_sqrt(static_cast<double>(channels));
    Scratch<double> joined(2 * channels), of_weight(channels);
    Scratch<float> weight(channels), scale(channels);
    double *dz = joined, *dz_u = dz + channels;
    load_row(args.forward.weight, 0, 0, channels, 1.0f, weight);
    for (int64_t c = 0; c < channels; ++c) of_weight[c] = 0;
    for (int64_t sample = 0; sample < cut.samples; ++sample) {
        for (int64_t c = 0; c < 2 * channels; ++c) joined[c] = 0;
        for (int64_t unit = 0; unit < cut.units; ++unit, sums += 2 * channels)
            for (int64_t c = 0; c < 2 * channels; ++c) joined[c] += sums[c];
        load_row(args.forward.scale, sample, 0, channels, 0.0f, scale);
        for (int64_t c = 0; c < channels; ++c) {
            const double dz_xhat = root * dz_u[c];
            of_weight[c] += (1.0 + scale[c]) * dz_xhat;
            if (args.scale) args.scale[sample * channels + c] = static_cast<float>(weight[c] * dz_xhat);
            if (args.shift) args.shift[sample * channels + c] = static_cast<float>(dz[c]);
        }
    }
    for (int64_t c = 0; args.weight && c < channels; ++c) args.weight[c] = static_cast<float>(of_weight[c]);
}

template <class T, bool kSilu>
void backward(const ChannelRmsNormBackwardArgs& args) {
    const Cut cut(args.forward);
    Scratch<double> sums(cut.samples * cut.units * 2 * cut.channels);
    for_each_unit<BackwardMemory>(
        args.forward, cut, [&](BackwardMemory& memory, int64_t sample, int64_t unit, int64_t first, int64_t end) {
            double* of_unit = sums + unit * 2 * cut.channels;
            for (int64_t c = 0; c < 2 * cut.channels; ++c) of_unit[c] = 0;
            const int64_t base = sample * cut.channels * cut.pixels;
            for (int64_t p = first; p < end; p += cut.block) {
                const int64_t width = cut.block < end - p ? cut.block : end - p;
                const int64_t offset = base + (cut.rows ? p * cut.channels : p);
                const T* x = reinterpret_cast<const T*>(args.forward.x) + offset;
                const T* dy = reinterpret_cast<const T*>(args.dy) + offset;
                T* dx = reinterpret_cast<T*>(args.dx) + offset;
                const float* norm = args.forward.norm + sample * cut.pixels + p;
                const Sums of_channels = {of_unit, of_unit + cut.channels};
                if (cut.rows)
                    rows<T, kSilu>(args.forward, memory, x, dy, dx, norm, width, of_channels);
                else
                    planes<T, kSilu>(args.forward, memory, x, dy, dx, norm, width, of_channels);
            }
        });
    parameter_gradients(args, cut, sums);
}

template <class T>
void backward(const ChannelRmsNormBackwardArgs& args) {
    args.forward.silu ? backward<T, true>(args) : backward<T, false>(args);
}

}  // namespace

void channel_rms_norm_backward(const ChannelRmsNormBackwardArgs& args) {
    switch (args.forward.dtype) {
        case DType::bf16: return backward<bf16>(args);
        case DType::f16: return backward<f16>(args);
        default: return backward<float>(args);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
