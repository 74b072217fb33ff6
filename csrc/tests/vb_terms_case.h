// A random call of vb_terms with memory of exact size, and the formulas in long double.
#pragma once

#include <vector>

#include "cpu/vb_terms.h"
#include "tests/pointwise.h"

namespace diffkern::tests {

// What m^ is made of: y, x0, or both.
enum class Made { of_y, of_x0, of_both };
constexpr Made kMade[] = {Made::of_y, Made::of_x0, Made::of_both};

// Everything at random but what is asked for: strides, offsets, broadcasting, storage types, the source of y, clip,
// scales, which terms have one. Timestep 0 is among those of every batch.
class VbTermsCase {
 public:
    const SampleShape shape;
    const Made made;
    const bool learned, exact, clip;
    Tensor mean, variance, x0, y, grad_mean, grad_variance;
    Buffer terms, partial_sums;

    VbTermsCase(const SampleShape& shape, Made made, bool learned, bool exact, DType dtype, Random& random);

    VbTermsArgs args(bool with_grad, int num_threads) const;

    struct Element {
        Wide square, bound, x0_square;  // of mse; twice the bound's in nats; of x0_mse
        Wide of_mean, of_variance;      // the gradient
    };
    Element expected(int64_t sample, int64_t i) const;
    std::string describe() const;

 private:
    const bool generated_, mean_of_x0_, stops_mean_;
    const int64_t levels_;
    Source source_;
    std::vector<double> coefficients_, scale_;
    std::vector<int64_t> t_;
};

}  // namespace diffkern::tests
