#include "tests/group_norm_case.h"

namespace diffkern::tests {

GroupNormCase::GroupNormCase(const GroupNormShape& size, bool channels_last, DType dtype, double center, Random& random)
    : shape{size.samples, size.channels, size.pixels, channels_last},
      num_groups(size.groups),
      dtype(dtype),
      silu(random.coin()),
      x_channels(random.coin() ? size.channels : random.below(size.channels + 1)),
      x(dtype, size.samples * x_channels * size.pixels, random.below(2)),
      skip(dtype, size.samples * (size.channels - x_channels) * size.pixels, random.below(2)),
      dy(dtype, x.count() + skip.count(), random.below(2)),
      y(dtype, dy.count(), random.below(2)),
      dx(dtype, x.count(), random.below(2)),
      dskip(dtype, skip.count(), random.below(2)),
      mean(DType::f32, size.samples * size.groups),
      rstd(DType::f32, size.samples * size.groups),
      sum_dz(DType::f32, size.samples * size.channels),
      sum_dz_xhat(DType::f32, size.samples * size.channels),
      doffset(DType::f32, size.samples * size.channels) {
    random.fill(dy, -1, 1);
    const auto parameter = [&](bool per_sample, double low = -1.5) {
        const int64_t channel_stride = random.below(4) == 0 ? 2 : 1;
        const int64_t sample_stride = per_sample ? 2 * channel_stride * size.channels : 0;
        const DType any = kFloat32AndBelow[random.below(3)],
                    dtype = std::fabs(low) > 6e4 ? DType::f32 : any;  // f16 ends
        auto made = std::make_unique<ParameterBuffer>(dtype, per_sample ? size.samples : 1, size.channels,
                                                      sample_stride, channel_stride);
        random.fill(made->buffer, low, low + 3);
        return made;
    };
    if (random.below(4) != 0) weight = parameter(false);
    if (random.below(4) != 0) bias = parameter(false);
    if (random.coin()) scale = parameter(true);
    if (random.coin()) shift = parameter(true);
    if (random.coin()) offset = parameter(true, center - 1.5);
    const double of_x = offset ? 0 : center;
    random.fill(x, of_x - 2, of_x + 2);
    random.fill(skip, of_x - 2, of_x + 2);
}

GroupNormArgs GroupNormCase::forward_args(int num_threads) const {
    const auto parameter = [](const ParameterPtr& p) { return p ? p->parameter() : Parameter{}; };
    return {shape,
            num_groups,
            dtype,
            x.data(),
            skip.data(),
            x_channels,
            parameter(weight),
            parameter(bias),
            parameter(scale),
            parameter(shift),
            parameter(offset),
            eps,
            silu,
            y.data(),
            mean.as<float>(),
            rstd.as<float>(),
            num_threads};
}

GroupNormBackwardArgs GroupNormCase::backward_args(int num_threads) const {
    GroupNormArgs forward = forward_args(num_threads);
    forward.y = nullptr;
    return {forward,
            dy.data(),
            dx.data(),
            dskip.data(),
            sum_dz.as<float>(),
            sum_dz_xhat.as<float>(),
            offset ? doffset.as<float>() : nullptr};
}

std::string GroupNormCase::describe() const {
    return text(tests::describe(shape), " in ", num_groups, " groups ", name_of(dtype), silu ? ", silu" : "",
                weight ? ", weight" : "", bias ? ", bias" : "", scale ? ", scale" : "", shift ? ", shift" : "",
                offset ? ", offset" : "", ", ", x_channels, " channels of x");
}

Affine::Affine(const GroupNormCase& norm, int64_t sample, int64_t channel) {
    const auto value = [&](const ParameterPtr& p, double absent) { return p ? p->at(sample, channel) : absent; };
    const double factor = 1 + value(norm.scale, 0), bias = value(norm.bias, 0), shift = value(norm.shift, 0);
    gamma = value(norm.weight, 1) * factor;
    beta = bias * factor + shift;
    beta_size = std::fabs(bias * factor) + std::fabs(shift);
}

Statistics::Statistics(const GroupNormCase& norm, int64_t sample, int64_t group) : mean(0), variance(0) {
    const auto for_each = [&](auto fn) {
        for (int64_t c = group * norm.per_group(); c < (group + 1) * norm.per_group(); ++c)
            for (int64_t p = 0; p < norm.shape.pixels; ++p) fn(norm.input(sample, c, p));
    };
    const auto count = static_cast<double>(norm.per_group() * norm.shape.pixels);
    for_each([&](double value) { mean += value / count; });
    for_each([&](double value) { variance += (value - mean) * (value - mean) / count; });
    rstd = 1 / std::sqrt(variance + norm.eps);
}

}  // namespace diffkern::tests
