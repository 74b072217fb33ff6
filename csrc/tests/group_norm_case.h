// A call of group_norm, forward and backward, with memory of exact size, and the formulas in double.
#pragma once

#include <memory>
#include <vector>

#include "cpu/group_norm.h"
#include "tests/pointwise.h"

namespace diffkern::tests {

// (C,) or (N, C) with any strides, ending with its last value.
struct ParameterBuffer {
    int64_t sample_stride, channel_stride;
    Buffer buffer;

    ParameterBuffer(DType dtype, int64_t samples, int64_t channels, int64_t sample_stride, int64_t channel_stride)
        : sample_stride(sample_stride),
          channel_stride(channel_stride),
          buffer(dtype, (samples - 1) * sample_stride + (channels - 1) * channel_stride + 1) {
    }
    double at(int64_t sample, int64_t channel) const {
        return buffer.get(sample * sample_stride + channel * channel_stride);
    }
    Parameter parameter() const {
        return {buffer.data(), buffer.dtype(), sample_stride, channel_stride};
    }
};
using ParameterPtr = std::unique_ptr<ParameterBuffer>;

struct GroupNormShape {
    int64_t samples, channels, pixels, groups;
};

// One value a group; one channel a group, one group; as many channels a group as fit the stack, and more; more values
// than one block of any kernel, in a slab and in a column of pixels; a last vector of every length in both formats.
inline std::vector<GroupNormShape> group_norm_shapes() {
    std::vector<GroupNormShape> shapes = {{2, 3, 1, 3},    {3, 4, 1, 2},   {3, 12, 33, 4},  {2, 14, 18, 7},
                                          {2, 32, 9, 32},  {1, 128, 3, 2}, {1, 130, 17, 2}, {2, 66, 131, 3},
                                          {1, 2, 4999, 1}, {2, 40, 301, 8}};
    for (int64_t size = 1; size <= 33; ++size) {
        shapes.push_back({2, 2, size, 1});
        shapes.push_back({1, size, 3, 1});
    }
    return shapes;
}

struct GroupNormCase {
    SampleShape shape;
    int64_t num_groups;
    DType dtype;
    bool silu;
    double eps = 1e-5;
    int64_t x_channels;  // the others are skip's
    Buffer x, skip, dy, y, dx, dskip, mean, rstd, sum_dz, sum_dz_xhat, doffset;
    ParameterPtr weight, bias, scale, shift, offset;

    // x + offset is uniform around `center` with a width of 4. Affine, scale-shift, offset and skip are there or not,
    // in any type and strides; an offset is as large as the center.
    GroupNormCase(const GroupNormShape& size, bool channels_last, DType dtype, double center, Random& random);

    GroupNormArgs forward_args(int num_threads) const;
    GroupNormBackwardArgs backward_args(int num_threads) const;
    std::string describe() const;

    int64_t per_group() const {
        return shape.channels / num_groups;
    }
    // Where a value lies in y and dy.
    int64_t position(int64_t sample, int64_t channel, int64_t pixel) const {
        return (sample * shape.channels * shape.pixels) +
               (shape.channels_last ? pixel * shape.channels + channel : channel * shape.pixels + pixel);
    }
    // What stands in x or skip, with the offset.
    double input(int64_t sample, int64_t channel, int64_t pixel) const {
        return at(x, skip, sample, channel, pixel) + (offset ? offset->at(sample, channel) : 0);
    }
    double gradient(int64_t sample, int64_t channel, int64_t pixel) const {
        return at(dx, dskip, sample, channel, pixel);
    }

 private:
    double at(const Buffer& of_x, const Buffer& of_skip, int64_t sample, int64_t channel, int64_t pixel) const {
        const bool first = channel < x_channels;
        const int64_t channels = first ? x_channels : shape.channels - x_channels;
        const int64_t c = first ? channel : channel - x_channels, base = sample * channels * shape.pixels;
        return (first ? of_x : of_skip)
            .get(base + (shape.channels_last ? pixel * channels + c : c * shape.pixels + pixel));
    }
};

// gamma' and beta' of a channel, and the size of what beta' was added up from.
struct Affine {
    double gamma, beta, beta_size;

    Affine(const GroupNormCase& norm, int64_t sample, int64_t channel);
};

struct Statistics {
    double mean, variance, rstd;

    Statistics(const GroupNormCase& norm, int64_t sample, int64_t group);
};

// The float32 rounding unit, and what the kernels may lose to it in units of the terms' sizes. A value passes some
// eight roundings (the difference, rstd, gamma', products, sums). A sum in float32 over a block or a column of n values
// of one sign is off by some sqrt(n)/2 units, n being 256 at most: half of that reaches rstd.
constexpr double kUnit = 0x1p-24, kPerValue = 8, kPerSum = 8;

// How far the kernel's x_hat may be from the exact one.
inline double xhat_error(double xhat) {
    return kUnit * (kPerValue + kPerSum) * (std::fabs(xhat) + 1);
}

inline double z_error(const Affine& affine, double xhat_error) {
    return std::fabs(affine.gamma) * xhat_error + kUnit * kPerValue * affine.beta_size;
}

}  // namespace diffkern::tests
