#include "tests/diffusion_loss_case.h"

#include <algorithm>

namespace diffkern::tests {
namespace {

constexpr int64_t kTimesteps = 5;

Tensor input(DType dtype, const SampleShape& shape, Random& random) {
    Tensor made(dtype, shape, random.below(4), random.below(2), random.below(4) == 0);
    made.fill(random, -2, 2);
    return made;
}

std::vector<double> reals(int64_t count, double low, double high, Random& random) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) value = random.real(low, high);
    return values;
}

}  // namespace

DiffusionLossCase::DiffusionLossCase(const SampleShape& shape, LossTarget target, DType dtype, bool generated,
                                     Random& random, std::optional<DType> inputs)
    : shape(shape),
      target(target),
      model_output(input(dtype, shape, random)),
      x0(input(inputs.value_or(kFloat32AndBelow[random.below(3)]), shape, random)),
      noise(input(inputs.value_or(kFloat32AndBelow[random.below(3)]), shape, random)),
      grad(dtype, shape, random.below(4), random.below(2)),
      loss(DType::f32, shape.samples),
      partial_sums(DType::f64, shape.samples * kSampleParts),
      generated_(generated),
      source_(shape.samples, random),
      signal_(reals(kTimesteps, 0, 1, random)),
      sigma_(reals(kTimesteps, 0, 1, random)),
      weight_(reals(random.coin() ? shape.samples : 0, -1, 3, random)),
      scale_(reals(random.coin() ? shape.samples : 1, -1000, 1000, random)) {
    for (int64_t i = 0; i < shape.samples; ++i) t_.push_back(random.below(kTimesteps));
}

// What the target is not made of is absent.
DiffusionLossArgs DiffusionLossCase::args(bool with_grad, int num_threads) const {
    DiffusionLossArgs args{};
    args.shape = shape;
    args.target = target;
    args.model_output = model_output.operand();
    if (target != LossTarget::eps) args.x0 = x0.operand();
    if (target != LossTarget::x0 && generated_) args.source = source_.args();
    if (target != LossTarget::x0 && !generated_) args.noise = noise.operand();
    args.t = t_.data();
    args.sqrt_alphas_cumprod = signal_.data();
    args.sqrt_one_minus_alphas_cumprod = sigma_.data();
    args.weight = weight_.empty() ? nullptr : weight_.data();
    args.partial_sums = partial_sums.as<double>();
    args.loss = loss.as<float>();
    args.num_threads = num_threads;
    if (with_grad) {
        args.scale = scale_.data();
        args.scale_per_sample = scale_.size() > 1;
        args.grad = grad.operand();
    }
    return args;
}

Bounded DiffusionLossCase::residual(int64_t sample, int64_t i) const {
    const Bounded m(model_output.at(sample, i), kFloat), start(x0.at(sample, i), kFloat);
    if (target == LossTarget::x0) return m - start;
    const Bounded eps =
        generated_ ? noise_at(source_.args(), shape, sample, i, DType::f32) : Bounded(noise.at(sample, i), kFloat);
    if (target == LossTarget::eps) return m - eps;
    const auto step = static_cast<size_t>(t_[static_cast<size_t>(sample)]);
    return m - (coefficient(signal_[step], kFloat) * eps - coefficient(sigma_[step], kFloat) * start);
}

Bounded DiffusionLossCase::expected_grad(int64_t sample, int64_t i) const {
    const double scale = scale_[scale_.size() > 1 ? static_cast<size_t>(sample) : 0];
    const double slope = scale * weight_of(sample) * 2.0 / static_cast<double>(grad.size);
    return coefficient(slope, kFloat) * residual(sample, i);
}

Bounded DiffusionLossCase::expected_loss(int64_t sample, int lanes) const {
    Wide sum = 0, error = 0;
    for (int64_t i = 0; i < grad.size; ++i) {
        const Bounded r = residual(sample, i), square = r * r;
        sum += square.value;
        error += square.error;
    }
    // A square meets this many float32 additions at most: four vectors side by side over a chunk (2048 values, or 32
    // pixels with all their channels), the vectors behind these, then the lanes. What follows is in double.
    const int64_t chunk = std::min(grad.size, std::max<int64_t>(2048, 32 * shape.channels));
    const auto additions = static_cast<Wide>(chunk / (4 * lanes) + 4 + 2 + 4);
    error += additions * kFloat.unit * (sum + error);
    const Wide factor = static_cast<Wide>(weight_of(sample)) / static_cast<Wide>(grad.size);
    const auto roundings = static_cast<Wide>(grad.size + 3) * kDouble.unit;
    return {sum * factor, std::fabs(factor) * (error + roundings * sum), kFloat};
}

std::string DiffusionLossCase::describe() const {
    return text("target ", static_cast<int>(target), " ", tests::describe(shape), " ",
                name_of(model_output.buffer.dtype()), generated_ ? " generated" : " given");
}

}  // namespace diffkern::tests
