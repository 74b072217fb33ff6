#include "tests/vb_terms_case.h"

#include <cmath>

namespace diffkern::tests {
namespace {

constexpr int64_t kTimesteps = 4;
constexpr Wide kLow = -0.75L, kHigh = 0.5L;

Tensor input(DType dtype, const SampleShape& shape, double low, double high, Random& random) {
    Tensor made(dtype, shape, random.below(4), random.below(2), random.below(4) == 0);
    made.fill(random, low, high);
    return made;
}

struct Bin {
    Wide value, of_difference, of_log_var;
};

// -ln(F(z+) - F(z-)) with F the normal distribution's or OpenAI's approximation, on the side of the smaller tail.
Bin decoded(Wide difference, Wide log_var, Wide x0, int64_t levels, bool exact) {
    const Wide half = 1.0L / static_cast<Wide>(levels - 1), inverse = std::exp(-0.5L * log_var);
    const Wide z[2] = {(difference + half) * inverse, (difference - half) * inverse};
    const Wide k = 2 * std::sqrt(2 / std::acos(-1.0L));
    auto tail = [&](Wide at) {  // 1 - F
        return exact ? std::erfc(at / std::sqrt(2.0L)) / 2 : 1 / (1 + std::exp(k * (at + 0.044715L * at * at * at)));
    };
    auto density = [&](Wide at) {
        if (exact) return std::exp(-at * at / 2) / std::sqrt(2 * std::acos(-1.0L));
        return tail(at) * tail(-at) * k * (1 + 3 * 0.044715L * at * at);
    };
    const bool first = x0 < -0.999L, last = x0 > 0.999L;
    const Wide p = first             ? tail(-z[0])
                   : last            ? tail(z[1])
                   : z[0] + z[1] > 0 ? tail(z[1]) - tail(z[0])
                                     : tail(-z[0]) - tail(-z[1]);
    if (!exact && p < 1e-12L) return {-std::log(1e-12L), 0, 0};
    const Wide up = last ? 0 : density(z[0]) / p, down = first ? 0 : density(z[1]) / p;
    return {-std::log(p), inverse * (down - up), (z[0] * up - z[1] * down) / 2};
}

}  // namespace

VbTermsCase::VbTermsCase(const SampleShape& shape, Made made, bool learned, bool exact, DType dtype, Random& random)
    : shape(shape),
      made(made),
      learned(learned),
      exact(exact),
      clip(random.coin()),
      mean(input(dtype, shape, -1, 1, random)),
      variance(input(dtype, shape, -1, 1, random)),
      x0(input(kFloat32AndBelow[random.below(3)], shape, -1, 1, random)),
      y(input(kFloat32AndBelow[random.below(3)], shape, -1, 1, random)),
      grad_mean(dtype, shape, random.below(4), random.below(2)),
      grad_variance(dtype, shape, random.below(4), random.below(2)),
      terms(DType::f32, kVbTerms * shape.samples),
      partial_sums(DType::f64, kVbTerms * kSampleParts * shape.samples),
      generated_(random.coin()),
      mean_of_x0_(random.coin()),
      stops_mean_(random.coin()),
      levels_(random.coin() ? 17 : 256),
      source_(shape.samples, random) {
    for (int64_t i = 0; i < x0.size; i += 3) x0.buffer.set(i, i % 2 ? 1 : -1);
    for (int64_t t = 0; t < kTimesteps; ++t) {
        const double slope = learned ? random.real(0.5, 1.5) : 0;
        // In the order of VbColumn. Residuals are of the size of sigma; were they scaled down to nothing, the decoder's
        // derivative would be at its root.
        const double x0_scale = (random.coin() ? 1 : -1) * random.real(0.3, 0.9);
        const double of_y = made == Made::of_x0 ? 0 : random.real(0.5, 1);
        const double of_x0 = made == Made::of_y ? 0 : random.real(-1, 1);
        for (const double c :
             {of_y, of_x0, x0_scale, random.real(0.5, 1), random.real(-1, 1), random.real(-0.3, 0.3), slope})
            coefficients_.push_back(c);
    }
    for (int64_t i = 0; i < shape.samples; ++i) t_.push_back(i % 2 ? random.below(kTimesteps) : 0);
    const int64_t rows = random.coin() ? shape.samples : 1;
    for (int64_t i = 0; i < rows * kVbTerms; ++i) scale_.push_back(random.below(4) ? random.real(-100, 100) : 0);
}

VbTermsArgs VbTermsCase::args(bool with_grad, int num_threads) const {
    VbTermsArgs args{};
    args.shape = shape;
    args.mean = mean.operand();
    if (learned) args.variance = variance.operand();
    args.x0 = x0.operand();
    args.reads_y = made != Made::of_x0;
    if (args.reads_y && generated_) args.source = source_.args();
    if (args.reads_y && !generated_) args.y = y.operand();
    args.x0_in_target = made != Made::of_y;
    args.mean_of_x0 = mean_of_x0_;
    args.stops_mean = stops_mean_;
    args.t = t_.data();
    args.coefficients = coefficients_.data();
    args.levels = levels_;
    args.exact = exact;
    args.clip = clip;
    args.clip_low = static_cast<double>(kLow);
    args.clip_high = static_cast<double>(kHigh);
    args.partial_sums = partial_sums.as<double>();
    args.terms = terms.as<float>();
    args.num_threads = num_threads;
    if (with_grad) {
        args.scale = scale_.data();
        args.scale_per_sample = static_cast<int64_t>(scale_.size()) > kVbTerms;
        args.grad_mean = grad_mean.operand();
        if (learned) args.grad_variance = grad_variance.operand();
    }
    return args;
}

VbTermsCase::Element VbTermsCase::expected(int64_t sample, int64_t i) const {
    const int64_t t = t_[static_cast<size_t>(sample)];
    const double* c = coefficients_.data() + t * kVbColumns;
    const double* scale = scale_.data() + (static_cast<int64_t>(scale_.size()) > kVbTerms ? sample * kVbTerms : 0);
    const Wide start = x0.at(sample, i), v = learned ? variance.at(sample, i) : 0;
    const Wide noise = generated_ ? noise_at(source_.args(), shape, sample, i, DType::f32).value : y.at(sample, i);
    const Wide residual = mean.at(sample, i) - ((made == Made::of_x0 ? 0 : c[kOfY] * noise) + c[kOfX0] * start);
    Wide x0_error = c[kX0Scale] * residual;
    const Wide predicted = start - x0_error;
    const bool outside = clip && (predicted < kLow || predicted > kHigh);
    if (outside) x0_error = start - (predicted < kLow ? kLow : kHigh);
    const bool of_x0 = clip && mean_of_x0_;
    const Wide difference = c[kCoef1] * (of_x0 ? x0_error : c[kX0Scale] * residual);
    const Wide delta = c[kDeltaBias] + c[kDeltaSlope] * v;
    Bin bin;
    if (t == 0) {
        bin = decoded(difference, delta + c[kLogVar], start, levels_, exact);
    } else {
        const Wide e = std::exp(-delta), precision = std::exp(-static_cast<Wide>(c[kLogVar]));
        const Wide squared = difference * difference * precision;
        bin = {(delta + std::expm1(-delta) + e * squared) / 2, e * precision * difference, (1 - e * (1 + squared)) / 2};
    }
    const Wide size = static_cast<Wide>(x0.size), of_vb = scale[1] / (size * std::log(2.0L));
    Wide of_mean = 2 * scale[0] * residual / size;
    if (!outside) of_mean += 2 * scale[2] * c[kX0Scale] * x0_error / size;
    if (!stops_mean_ && !(outside && mean_of_x0_)) of_mean += of_vb * c[kCoef1] * c[kX0Scale] * bin.of_difference;
    return {residual * residual, 2 * bin.value, x0_error * x0_error, of_mean, of_vb * c[kDeltaSlope] * bin.of_log_var};
}

std::string VbTermsCase::describe() const {
    return text("made of ", static_cast<int>(made), learned ? " learned " : " fixed ", exact ? "exact " : "tanh ",
                clip ? "clip " : "", tests::describe(shape), " ", name_of(mean.buffer.dtype()));
}

}  // namespace diffkern::tests
