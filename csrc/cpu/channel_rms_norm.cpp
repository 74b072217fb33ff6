// The norm over the channels of every pixel, with the scale-shift form and SiLU. Reads x from memory once and writes y
// once: 8 bytes an element in float32, and 4 a pixel for the norm. How memory is walked stands in
// channel_rms_norm_math.h.
#include "cpu/channel_rms_norm.h"

#include "cpu/channel_rms_norm_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {
namespace {

struct ForwardMemory {
    SampleParameters parameters;
    Scratch<float> block;        // (C, pixels of a block) of planes
    Scratch<float> reciprocals;  // of a block's pixels; their sums of squares to begin with

    explicit ForwardMemory(const Cut& cut)
        : parameters(cut.channels), block(cut.rows ? 0 : cut.channels * cut.block), reciprocals(cut.block) {
    }
};

// The square root of sums of squares in float32, and where squares have passed the range of float32 `exact(i)`, the
// sum in double, whose range holds them all. What is surely below eps needs no exact value.
template <class Exact>
DIFFKERN_INLINE f32v norms(f32v squares, int n, float eps, Exact exact) {
    const float smallest = eps > 2e-15f ? 0.0f : 1e-30f;
    f32v norm = sqrt(squares);
    const i32v right = (squares >= smallest) & (squares <= 1e38f);
    if (any(~right))
        for (int i = 0; i < n; ++i)
            if (!right[i]) norm[i] = static_cast<float>(__builtin_sqrt(exact(i)));
    return norm;
}

template <class T>
double exact_squares(const T* x, int64_t channels, int64_t stride) {
    double total = 0;
    for (int64_t c = 0; c < channels; ++c) {
        const double value = to_float(x[c * stride]);
        total += value * value;
    }
    return total;
}

// Adds the squares of kChannels planes to the sums, and keeps the planes.
template <int kChannels, class T>
DIFFKERN_INLINE void add_squares(const T* x, int64_t plane, int64_t width, float* kept, int64_t stride,
                                 float* squares) {
    for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        f32v total = {};
        for (int k = 0; k < kChannels; ++k) {
            const f32v value = load_n(x + k * plane + i, n);
            store(kept + k * stride + i, value);
            total += value * value;
        }
        store(squares + i, load(squares + i) + total);
    });
}

// `width` pixels from x and y on, of all planes.
template <class T, bool kSilu>
void planes(const ChannelRmsNormArgs& args, ForwardMemory& memory, const T* x, T* y, float* norm, int64_t width) {
    const int64_t channels = args.shape.channels, plane = args.shape.pixels, stride = whole_vectors(width);
    float *kept = memory.block, *r = memory.reciprocals;
    for (int64_t i = 0; i < stride; ++i) r[i] = 0.0f;
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) add_squares<4>(x + c * plane, plane, width, kept + c * stride, stride, r);
    for (; c < channels; ++c) add_squares<1>(x + c * plane, plane, width, kept + c * stride, stride, r);
    for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const f32v of_pixels =
            norms(load(r + i), n, args.eps, [&](int lane) { return exact_squares(kept + i + lane, channels, stride); });
        store_n(norm + i, of_pixels, n);
        store(r + i, reciprocal(of_pixels, args.eps));
    });
    const float *gamma = memory.parameters.gamma, *shift = memory.parameters.shift;
    for (c = 0; c < channels; ++c) {
        const float a = gamma[c], b = shift[c];
        const float* row = kept + c * stride;
        T* out = y + c * plane;
        for_lanes(0, width, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            store_n(out + i, activate<kSilu>(load(row + i) * load(r + i) * a + b), n);
        });
    }
}

template <class T>
float row_squares(const T* x, int64_t channels) {
    f32v total[4] = {};
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
        for (int u = 0; u < 4; ++u) {
            const f32v value = load(x + c + u * kLanes);
            total[u] += value * value;
        }
    for_lanes(c, channels, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const f32v value = load_n(x + i, n);
        total[0] += value * value;
    });
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// `count` pixels, all channels of each.
template <class T, bool kSilu>
void rows(const ChannelRmsNormArgs& args, ForwardMemory& memory, const T* x, T* y, float* norm, int64_t count) {
    const int64_t channels = args.shape.channels;
    float* r = memory.reciprocals;
    for (int64_t p = 0; p < count; ++p) r[p] = row_squares(x + p * channels, channels);
    for_lanes(0, count, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const f32v of_pixels = norms(load_n(r + i, n), n, args.eps,
                                     [&](int lane) { return exact_squares(x + (i + lane) * channels, channels, 1); });
        store_n(norm + i, of_pixels, n);
        store(r + i, reciprocal(of_pixels, args.eps));
    });
    const float *gamma = memory.parameters.gamma, *shift = memory.parameters.shift;
    for (int64_t p = 0; p < count; ++p, x += channels, y += channels) {
        const float factor = r[p];
        for_lanes(0, channels, [&](int64_t c, int n) DIFFKERN_LAMBDA {
            store_n(y + c, activate<kSilu>(load_n(x + c, n) * factor * load(gamma + c) + load(shift + c)), n);
        });
    }
}

template <class T, bool kSilu>
void forward(const ChannelRmsNormArgs& args) {
    const Cut cut(args);
    for_each_unit<ForwardMemory>(args, cut,
                                 [&](ForwardMemory& memory, int64_t sample, int64_t, int64_t first, int64_t end) {
                                     const int64_t base = sample * cut.channels * cut.pixels;
                                     for (int64_t p = first; p < end; p += cut.block) {
                                         const int64_t width = cut.block < end - p ? cut.block : end - p;
                                         const int64_t offset = base + (cut.rows ? p * cut.channels : p);
                                         const T* x = reinterpret_cast<const T*>(args.x) + offset;
                                         T* y = reinterpret_cast<T*>(args.y) + offset;
                                         float* norm = args.norm + sample * cut.pixels + p;
                                         if (cut.rows)
                                             rows<T, kSilu>(args, memory, x, y, norm, width);
                                         else
                                             planes<T, kSilu>(args, memory, x, y, norm, width);
                                     }
                                 });
}

template <class T>
void forward(const ChannelRmsNormArgs& args) {
    args.silu ? forward<T, true>(args) : forward<T, false>(args);
}

}  // namespace

void channel_rms_norm(const ChannelRmsNormArgs& args) {
    switch (args.dtype) {
        case DType::bf16: return forward<bf16>(args);
        case DType::f16: return forward<f16>(args);
        default: return forward<float>(args);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
