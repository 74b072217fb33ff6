// What the tests of the pointwise ops share: tensors of exact size with room between their samples, shapes, the noise
// that the counter decides.
#pragma once

#include <vector>

#include "cpu/noise.h"
#include "tests/bounded.h"
#include "tests/buffer.h"
#include "tests/philox_reference.h"

namespace diffkern::tests {

// A last vector of every length, in one value to two vectors and some; more than a task's chunk; channels-last pixels
// that pass a chunk, by themselves and (128 channels) only with the room for their noise.
inline std::vector<SampleShape> shapes() {
    std::vector<SampleShape> shapes = {{3, 3, 7, false},    {2, 5, 33, false},   {2, 3, 701, false},
                                       {1, 1, 2049, false}, {1, 128, 37, false}, {1, 130, 37, false},
                                       {2, 66, 35, false}};
    for (int64_t pixels = 1; pixels <= 33; ++pixels) shapes.push_back({2, 1, pixels, false});
    return shapes;
}

inline SampleShape in_format(SampleShape shape, bool channels_last) {
    shape.channels_last = channels_last;
    return shape;
}

inline std::string describe(const SampleShape& shape) {
    return text(shape.samples, "x", shape.channels, "x", shape.pixels, shape.channels_last ? " channels last" : "");
}

// The index in channel, pixel order of the value at memory position i of a sample.
inline int64_t element_at(const SampleShape& shape, int64_t i) {
    return shape.channels_last ? i % shape.channels * shape.pixels + i / shape.channels : i;
}

// N samples of `size` values with `gap` values between one and the next; or one sample for all of them.
class Tensor {
 public:
    const int64_t samples, size, stride;
    Buffer buffer;

    Tensor(DType dtype, const SampleShape& shape, int64_t gap = 0, int64_t offset = 0, bool broadcast = false)
        : samples(broadcast ? 1 : shape.samples),
          size(shape.channels * shape.pixels),
          stride(broadcast ? 0 : size + gap),
          buffer(dtype, (samples - 1) * stride + size, offset) {
    }

    Operand operand() const {
        return buffer.operand(stride);
    }
    double at(int64_t sample, int64_t i) const {
        return buffer.get(sample * stride + i);
    }
    void fill(Random& random, double low, double high) {
        random.fill(buffer, low, high);
        for (int64_t sample = 0; sample + 1 < samples; ++sample)
            for (int64_t i = size; i < stride; ++i) buffer.set(sample * stride + i, std::nan(""));
    }
    void poison(int64_t sample) {
        for (int64_t i = 0; i < size; ++i) buffer.set(sample * stride + i, std::nan(""));
    }
    // Whether what lies between the samples is still NaN.
    bool gaps_are_untouched() const {
        for (int64_t sample = 0; sample + 1 < samples; ++sample)
            for (int64_t i = size; i < stride; ++i)
                if (!std::isnan(at(sample, i))) return false;
        return true;
    }
};

// The arguments of counter-based noise with storage of their own.
struct Source {
    int64_t seed = 0x0123456789abcdef;
    std::vector<int64_t> draws, samples;
    bool draw_per_sample, index_per_sample;

    // Offsets that wrap, indices beyond 2^32.
    Source(int64_t count, Random& random) : draw_per_sample(random.coin()), index_per_sample(random.coin()) {
        for (int64_t i = 0; i < (draw_per_sample ? count : 1); ++i) draws.push_back(random.below(1000));
        if (!index_per_sample) samples.push_back(random.coin() ? INT64_MAX - 1 : 17);
        for (int64_t i = 0; index_per_sample && i < count; ++i)
            samples.push_back(static_cast<int64_t>(random.word() >> 20));
    }
    NoiseArgs args() const {
        return {&seed, draws.data(), draw_per_sample, samples.data(), index_per_sample, 3};
    }
};

// A normal that a kernel computes in this arithmetic: float32 is promised within 4 ulp; float64 is a logarithm, a root,
// an angle, a cosine and two products through libm, half an ulp or one each.
inline Bounded noise_at(const NoiseArgs& noise, const SampleShape& shape, int64_t sample, int64_t i, DType dtype) {
    const Wide z = exact_normal(philox_key(*noise.seed), tail_of(noise, sample), element_at(shape, i));
    return {z, dtype == DType::f64 ? 8 * ulp(z, 53) : 4 * ulp(z), arithmetic_of(dtype)};
}

// float64 arithmetic takes float64 operands alone, float32 arithmetic any of the others.
inline DType operand_dtype(DType out, Random& random) {
    return out == DType::f64 ? DType::f64 : kFloat32AndBelow[random.below(3)];
}

}  // namespace diffkern::tests
