// A call of channel_rms_norm, forward and backward, with memory of exact size.
#pragma once

#include "cpu/channel_rms_norm.h"
#include "tests/group_norm_case.h"

namespace diffkern::tests {

struct ChannelRmsNormCase {
    SampleShape shape;
    DType dtype;
    bool silu;
    float eps;  // far below every norm, or far above
    Buffer x, dy, y, dx, norm, dweight, dscale, dshift;
    ParameterPtr weight, scale, shift;

    ChannelRmsNormCase(const SampleShape& shape, DType dtype, Random& random)
        : shape(shape),
          dtype(dtype),
          silu(random.coin()),
          eps(random.below(4) == 0 ? 1e3f : 1e-12f),
          x(dtype, shape.samples * shape.channels * shape.pixels, random.below(2)),
          dy(dtype, x.count(), random.below(2)),
          y(dtype, x.count(), random.below(2)),
          dx(dtype, x.count(), random.below(2)),
          norm(DType::f32, shape.samples * shape.pixels),
          dweight(DType::f32, shape.channels),
          dscale(DType::f32, shape.samples * shape.channels),
          dshift(DType::f32, shape.samples * shape.channels) {
        random.fill(x, -1.5, 2.5);
        random.fill(dy, -1, 1);
        const auto parameter = [&](bool per_sample) {
            const int64_t channel_stride = random.below(4) == 0 ? 2 : 1;
            const int64_t sample_stride = per_sample ? 2 * channel_stride * shape.channels : 0;
            auto made =
                std::make_unique<ParameterBuffer>(kFloat32AndBelow[random.below(3)], per_sample ? shape.samples : 1,
                                                  shape.channels, sample_stride, channel_stride);
            random.fill(made->buffer, -1.5, 1.5);
            return made;
        };
        if (random.coin()) weight = parameter(false);
        if (random.coin()) scale = parameter(true);
        if (random.coin()) shift = parameter(true);
    }

    ChannelRmsNormArgs forward_args(int num_threads) const {
        const auto parameter = [](const ParameterPtr& p) { return p ? p->parameter() : Parameter{}; };
        return {shape, dtype, x.data(), parameter(weight), parameter(scale), parameter(shift),
                eps,   silu,  y.data(), norm.as<float>(),  num_threads};
    }
    ChannelRmsNormBackwardArgs backward_args(int num_threads) const {
        const auto gradient = [](const ParameterPtr& p, const Buffer& buffer) {
            return p ? buffer.as<float>() : nullptr;
        };
        ChannelRmsNormArgs forward = forward_args(num_threads);
        forward.y = nullptr;
        return {
            forward, dy.data(), dx.data(), gradient(weight, dweight), gradient(scale, dscale), gradient(shift, dshift)};
    }
    // Where a value lies in x, y, dy, dx.
    int64_t position(int64_t sample, int64_t channel, int64_t pixel) const {
        return (sample * shape.channels * shape.pixels) +
               (shape.channels_last ? pixel * shape.channels + channel : channel * shape.pixels + pixel);
    }
    std::string describe() const {
        return text(tests::describe(shape), " ", name_of(dtype), silu ? ", silu" : "", weight ? ", weight" : "",
                    scale ? ", scale" : "", shift ? ", shift" : "", ", eps ", eps);
    }
};

}  // namespace diffkern::tests
