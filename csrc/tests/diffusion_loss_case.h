// A call of diffusion_loss with memory of exact size, and the formulas with a bound on their rounding.
#pragma once

#include <optional>
#include <vector>

#include "cpu/diffusion_loss.h"
#include "tests/pointwise.h"

namespace diffkern::tests {

constexpr LossTarget kTargets[] = {LossTarget::eps, LossTarget::x0, LossTarget::v};

// Everything at random but what is asked for: strides, offsets, broadcasting, weights, one scale or one for each
// sample, and what x0 and the noise are stored as, unless `inputs` says it. The gradient has the model output's type.
class DiffusionLossCase {
 public:
    const SampleShape shape;
    const LossTarget target;
    Tensor model_output, x0, noise, grad;
    Buffer loss, partial_sums;

    DiffusionLossCase(const SampleShape& shape, LossTarget target, DType dtype, bool generated, Random& random,
                      std::optional<DType> inputs = {});

    DiffusionLossArgs args(bool with_grad, int num_threads) const;
    // Of the gradient at position i of a sample.
    Bounded expected_grad(int64_t sample, int64_t i) const;
    // `lanes`: how many the kernel adds side by side.
    Bounded expected_loss(int64_t sample, int lanes) const;
    std::string describe() const;

 private:
    Bounded residual(int64_t sample, int64_t i) const;
    double weight_of(int64_t sample) const {
        return weight_.empty() ? 1.0 : weight_[static_cast<size_t>(sample)];
    }

    const bool generated_;
    Source source_;
    std::vector<double> signal_, sigma_, weight_, scale_;
    std::vector<int64_t> t_;
};

}  // namespace diffkern::tests
