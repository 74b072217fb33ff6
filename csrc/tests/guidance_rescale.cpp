// guidance_rescale against two passes in long double: the mean, then the squared deviations from it.
#include "cpu/guidance_rescale.h"

#include "tests/rescale_case.h"

namespace diffkern::tests {
namespace {

struct Deviation {
    Wide mean = 0, std = 0, largest = 0;

    template <class Value>
    Deviation(int64_t size, Value value) {
        for (int64_t i = 0; i < size; ++i) {
            mean += value(i) / static_cast<Wide>(size);
            largest = std::fmax(largest, std::fabs(value(i)));
        }
        Wide squares = 0;
        for (int64_t i = 0; i < size; ++i) squares += (value(i) - mean) * (value(i) - mean);
        std = std::sqrt(squares / static_cast<Wide>(size - 1));
    }
    // Relative error of the deviation: of a sum of `size` positive terms, and of what each value was rounded by.
    Wide error(int64_t size, Wide of_value) const {
        return (static_cast<Wide>(size) + 8) * kDouble.unit + 2 * of_value / std;
    }
};

void check(const RescaleCase& guidance, int64_t sample) {
    const int64_t size = guidance.cond.size;
    const Wide w = guidance.guidance_scale[static_cast<size_t>(sample)];
    const auto u = [&](int64_t i) -> Wide { return guidance.uncond.at(sample, i); };
    const auto c = [&](int64_t i) -> Wide { return guidance.cond.at(sample, i); };
    const Deviation cond(size, c), guided(size, [&](int64_t i) { return u(i) + w * (c(i) - u(i)); });
    const Wide ratio = cond.std / guided.std, expected = guidance.phi * ratio + (1 - guidance.phi);
    // u + w (c - u): three roundings of at most (1 + 2 w) of the largest value; and the difference from a mean.
    const Wide largest = std::fmax(cond.largest, Deviation(size, u).largest);
    const Wide rounding = 4 * (1 + 2 * std::fabs(w)) * largest * kDouble.unit;
    const Wide error = expected * (cond.error(size, rounding) + guided.error(size, rounding) + 8 * kDouble.unit);
    const double actual = guidance.rescale.get(sample);
    CHECK(std::fabs(actual - expected) <= error, "r of sample ", sample, ": ", actual, " for ", expected, " +- ", error,
          ", ", describe(guidance.shape));
}

}  // namespace

TEST(guidance_rescale, is_the_ratio_of_deviations) {
    Random random(41);
    for (const double mean : {0.0, 1e3})
        for (const SampleShape& shape : shapes())
            for (const DType dtype : kDtypes) {
                if (shape.channels * shape.pixels < 2) continue;
                const RescaleCase guidance(shape, dtype, mean, random);
                guidance_rescale(guidance.args(1));
                for (int64_t sample = 0; sample < shape.samples; ++sample) check(guidance, sample);
            }
}

}  // namespace diffkern::tests
