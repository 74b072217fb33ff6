// group_norm backward: dx, the two sums and the parameters' gradients against docs/group_norm.md in double.
#include "tests/group_norm_case.h"

namespace diffkern::tests {
namespace {

// d act(z) / dz
double slope(const GroupNormCase& norm, double z) {
    if (!norm.silu) return 1;
    const double s = 1 / (1 + std::exp(-z));
    return s + s * z * (1 - s);
}

// A sum and what the kernel's may be off by.
struct Sum {
    double value = 0, error = 0;

    void add(double term, double term_error) {
        value += term;
        error += term_error + kUnit * kPerSum * std::fabs(term);
    }
};

// One value of the input with what the backward pass makes of it.
struct Value {
    double xhat, xhat_error, dz, dz_error;

    Value(const GroupNormCase& norm, const Statistics& statistics, const Affine& affine, int64_t sample,
          int64_t channel, int64_t pixel) {
        xhat = (norm.input(sample, channel, pixel) - statistics.mean) * statistics.rstd;
        // The mean that the forward pass left is a float32.
        xhat_error = tests::xhat_error(xhat) + kUnit * std::fabs(statistics.mean) * statistics.rstd;
        const double dy = norm.dy.get(norm.position(sample, channel, pixel));
        dz = dy * slope(norm, xhat * affine.gamma + affine.beta);
        // act'' is at most 1/2; act' itself takes an exponential (2 ulp) and some six operations.
        dz_error = norm.silu ? std::fabs(dy) * (0.5 * z_error(affine, xhat_error) + kUnit * (kPerValue + 4)) : 0;
    }
};

void check(double actual, double expected, double error, DType dtype, const char* name, const GroupNormCase& norm) {
    CHECK(Bounded(expected, error, kFloat).allows(actual, dtype), name, ": ", actual, " for ", expected, " +- ", error,
          ", ", norm.describe());
}

void check_group(const GroupNormCase& norm, int64_t sample, int64_t group) {
    const Statistics statistics(norm, sample, group);
    const int64_t first = group * norm.per_group(), end = first + norm.per_group();
    const auto count = static_cast<double>(norm.per_group() * norm.shape.pixels);
    Sum mean_dz, mean_dz_xhat;  // of gamma' dz and gamma' dz x_hat
    for (int64_t c = first; c < end; ++c) {
        const Affine affine(norm, sample, c);
        const double share = std::fabs(affine.gamma) / count;
        Sum dz, dz_xhat;
        for (int64_t p = 0; p < norm.shape.pixels; ++p) {
            const Value v(norm, statistics, affine, sample, c, p);
            dz.add(v.dz, v.dz_error);
            dz_xhat.add(v.dz * v.xhat, v.dz_error * std::fabs(v.xhat) + std::fabs(v.dz) * v.xhat_error);
        }
        mean_dz.add(affine.gamma * dz.value / count, share * dz.error);
        mean_dz_xhat.add(affine.gamma * dz_xhat.value / count, share * dz_xhat.error);
        const int64_t i = sample * norm.shape.channels + c;
        check(norm.sum_dz.get(i), dz.value, dz.error, DType::f32, "sum of dz", norm);
        check(norm.sum_dz_xhat.get(i), dz_xhat.value, dz_xhat.error, DType::f32, "sum of dz x_hat", norm);
    }
    for (int64_t c = first; c < end; ++c) {
        const Affine affine(norm, sample, c);
        Sum of_offset;
        for (int64_t p = 0; p < norm.shape.pixels; ++p) {
            const Value v(norm, statistics, affine, sample, c, p);
            const double dxhat = affine.gamma * v.dz;
            const double dx = statistics.rstd * (dxhat - mean_dz.value - v.xhat * mean_dz_xhat.value);
            const double size = std::fabs(dxhat) + std::fabs(mean_dz.value) + std::fabs(v.xhat * mean_dz_xhat.value);
            const double error = std::fabs(affine.gamma) * v.dz_error + mean_dz.error +
                                 std::fabs(v.xhat) * mean_dz_xhat.error + v.xhat_error * std::fabs(mean_dz_xhat.value) +
                                 kUnit * (kPerValue + kPerSum) * size;
            check(norm.gradient(sample, c, p), dx, statistics.rstd * error, norm.dtype, "dx", norm);
            of_offset.add(dx, statistics.rstd * (error + kUnit * kPerSum * size));
        }
        if (norm.offset)
            check(norm.doffset.get(sample * norm.shape.channels + c), of_offset.value, of_offset.error, DType::f32,
                  "d offset", norm);
    }
}

// From the sums that the kernel left, so that only this step's own roundings count.
void check_parameter_gradients(const GroupNormCase& norm) {
    const int64_t samples = norm.shape.samples, channels = norm.shape.channels;
    const Buffer weight(DType::f32, channels), bias(DType::f32, channels);
    const Buffer scale(DType::f32, samples * channels), shift(DType::f32, samples * channels);
    const GroupNormBackwardArgs args = norm.backward_args(1);
    group_norm_parameter_gradients({args, weight.as<float>(), bias.as<float>(), scale.as<float>(), shift.as<float>()});
    group_norm_parameter_gradients({args, nullptr, nullptr, nullptr, nullptr});
    const auto value = [](const ParameterPtr& p, int64_t n, int64_t c, double absent) {
        return p ? p->at(n, c) : absent;
    };
    for (int64_t c = 0; c < channels; ++c) {
        double of_weight = 0, of_bias = 0;
        for (int64_t n = 0; n < samples; ++n) {
            const int64_t i = n * channels + c;
            const double dz = norm.sum_dz.get(i), dz_xhat = norm.sum_dz_xhat.get(i);
            of_weight += (1 + value(norm.scale, n, c, 0)) * dz_xhat;
            of_bias += (1 + value(norm.scale, n, c, 0)) * dz;
            const double from_weight = value(norm.weight, n, c, 1) * dz_xhat,
                         from_bias = value(norm.bias, n, c, 0) * dz;
            check(scale.get(i), from_weight + from_bias, 2 * kUnit * (std::fabs(from_weight) + std::fabs(from_bias)),
                  DType::f32, "d scale", norm);
            CHECK(shift.get(i) == dz, "d shift, ", norm.describe());
        }
        // Summed in double: the float32 next to the sum, but for a tie.
        check(weight.get(c), of_weight, 1e-12, DType::f32, "d weight", norm);
        check(bias.get(c), of_bias, 1e-12, DType::f32, "d bias", norm);
    }
}

void check_backward(const GroupNormCase& norm) {
    group_norm(norm.forward_args(1));
    group_norm_backward(norm.backward_args(1));
    for (int64_t sample = 0; sample < norm.shape.samples; ++sample)
        for (int64_t group = 0; group < norm.num_groups; ++group) check_group(norm, sample, group);
    check_parameter_gradients(norm);
}

}  // namespace

TEST(group_norm_backward, is_the_derivative) {
    Random random(10);
    for (const GroupNormShape& size : group_norm_shapes())
        for (const bool channels_last : {false, true})
            for (const DType dtype : kFloat32AndBelow)
                check_backward(GroupNormCase(size, channels_last, dtype, 0.5, random));
}

TEST(group_norm_backward, large_means) {
    Random random(11);
    for (const GroupNormShape& size : group_norm_shapes())
        for (const bool channels_last : {false, true})
            check_backward(GroupNormCase(size, channels_last, DType::f32, 1e3, random));
}

}  // namespace diffkern::tests
