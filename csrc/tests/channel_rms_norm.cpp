// channel_rms_norm, forward and backward, against docs/channel_rms_norm.md in double.
#include "tests/channel_rms_norm_case.h"

namespace diffkern::tests {
namespace {

// A sum and what the kernel's may be off by.
struct Sum {
    double value = 0, error = 0;

    void add(double term, double term_error) {
        value += term;
        error += term_error + kUnit * kPerSum * std::fabs(term);
    }
};

struct Coefficients {
    double weight, one_plus_scale, gamma, shift;

    Coefficients(const ChannelRmsNormCase& norm, int64_t sample, int64_t channel) {
        const auto value = [&](const ParameterPtr& p, double absent) { return p ? p->at(sample, channel) : absent; };
        weight = value(norm.weight, 1);
        one_plus_scale = 1 + value(norm.scale, 0);
        gamma = std::sqrt(static_cast<double>(norm.shape.channels)) * weight * one_plus_scale;
        shift = value(norm.shift, 0);
    }
};

// One value of the input with what the two passes make of it.
struct Value {
    double u, u_error, y, y_error, dz, dz_error;

    Value(const ChannelRmsNormCase& norm, const Coefficients& c, double denominator, int64_t i) {
        u = norm.x.get(i) / denominator;
        u_error = kUnit * (kPerValue + kPerSum) * std::fabs(u);
        const double z = u * c.gamma + c.shift, dy = norm.dy.get(i), s = 1 / (1 + std::exp(-z));
        const double z_error =
            std::fabs(c.gamma) * u_error + kUnit * kPerValue * (std::fabs(u * c.gamma) + std::fabs(c.shift));
        y = norm.silu ? z * s : z;
        dz = norm.silu ? dy * (s + s * z * (1 - s)) : dy;
        // silu's slope is at most 1.1 and its second derivative 1/2; an exponential is off by four epsilons (vec.cpp).
        y_error = norm.silu ? 1.1 * z_error + 8 * kUnit * std::fabs(y) : z_error;
        dz_error = norm.silu ? std::fabs(dy) * (0.5 * z_error + kUnit * (kPerValue + 4)) : 0;
    }
};

void check(double actual, double expected, double error, DType dtype, const char* name,
           const ChannelRmsNormCase& norm) {
    CHECK(Bounded(expected, error, kFloat).allows(actual, dtype), name, ": ", actual, " for ", expected, " +- ", error,
          ", ", norm.describe());
}

double exact_norm(const ChannelRmsNormCase& norm, int64_t sample, int64_t pixel) {
    double squares = 0;
    for (int64_t c = 0; c < norm.shape.channels; ++c) {
        const double value = norm.x.get(norm.position(sample, c, pixel));
        squares += value * value;
    }
    return std::sqrt(squares);
}

void check_pixel(const ChannelRmsNormCase& norm, int64_t sample, int64_t pixel) {
    const double exact = exact_norm(norm, sample, pixel), denominator = exact < norm.eps ? norm.eps : exact;
    check(norm.norm.get(sample * norm.shape.pixels + pixel), exact, kUnit * kPerSum * exact, DType::f32, "norm", norm);
    Sum along;
    const auto for_each = [&](auto fn) {
        for (int64_t c = 0; c < norm.shape.channels; ++c) {
            const Coefficients of(norm, sample, c);
            const int64_t i = norm.position(sample, c, pixel);
            fn(of, Value(norm, of, denominator, i), i);
        }
    };
    for_each([&](const Coefficients& of, const Value& v, int64_t i) {
        check(norm.y.get(i), v.y, v.y_error, norm.dtype, "y", norm);
        const double of_gamma = std::fabs(of.gamma);
        along.add(of.gamma * v.dz * v.u, of_gamma * (v.dz_error * std::fabs(v.u) + std::fabs(v.dz) * v.u_error));
    });
    if (exact < norm.eps) along = {};
    for_each([&](const Coefficients& of, const Value& v, int64_t i) {
        const double du = of.gamma * v.dz, back = v.u * along.value;
        const double error = std::fabs(of.gamma) * v.dz_error + std::fabs(v.u) * along.error +
                             v.u_error * std::fabs(along.value) +
                             kUnit * (kPerValue + kPerSum) * (std::fabs(du) + std::fabs(back));
        check(norm.dx.get(i), (du - back) / denominator, error / denominator, norm.dtype, "dx", norm);
    });
}

void check_parameters(const ChannelRmsNormCase& norm) {
    const double root = std::sqrt(static_cast<double>(norm.shape.channels));
    for (int64_t c = 0; c < norm.shape.channels; ++c) {
        Sum of_weight;
        for (int64_t n = 0; n < norm.shape.samples; ++n) {
            const Coefficients of(norm, n, c);
            Sum dz, dz_xhat;
            for (int64_t p = 0; p < norm.shape.pixels; ++p) {
                const double exact = exact_norm(norm, n, p);
                const Value v(norm, of, exact < norm.eps ? norm.eps : exact, norm.position(n, c, p));
                dz.add(v.dz, v.dz_error);
                dz_xhat.add(root * v.dz * v.u, root * (v.dz_error * std::fabs(v.u) + std::fabs(v.dz) * v.u_error));
            }
            const int64_t i = n * norm.shape.channels + c;
            if (norm.shift) check(norm.dshift.get(i), dz.value, dz.error, DType::f32, "d shift", norm);
            if (norm.scale)
                check(norm.dscale.get(i), of.weight * dz_xhat.value, std::fabs(of.weight) * dz_xhat.error, DType::f32,
                      "d scale", norm);
            of_weight.add(of.one_plus_scale * dz_xhat.value, std::fabs(of.one_plus_scale) * dz_xhat.error);
        }
        if (norm.weight) check(norm.dweight.get(c), of_weight.value, of_weight.error, DType::f32, "d weight", norm);
    }
}

}  // namespace

// One pixel and one channel; a last vector of every length in both directions; more pixels than a block; more blocks
// than a unit; fewer pixels than a task takes.
TEST(channel_rms_norm, is_the_formula_and_its_derivative) {
    Random random(16);
    std::vector<SampleShape> shapes = {{3, 1, 5}, {7, 4, 1}, {2, 130, 17}, {1, 66, 1131}, {2, 3, 1301}, {40, 5, 6}};
    for (int64_t size = 1; size <= 33; ++size) {
        shapes.push_back({2, 3, size});
        shapes.push_back({2, size, 3});
    }
    for (const SampleShape& size : shapes)
        for (const bool channels_last : {false, true})
            for (const DType dtype : kFloat32AndBelow) {
                const ChannelRmsNormCase norm(in_format(size, channels_last), dtype, random);
                channel_rms_norm(norm.forward_args(1));
                channel_rms_norm_backward(norm.backward_args(1));
                for (int64_t sample = 0; sample < size.samples; ++sample)
                    for (int64_t pixel = 0; pixel < size.pixels; ++pixel) check_pixel(norm, sample, pixel);
                check_parameters(norm);
            }
}

}  // namespace diffkern::tests
