// dynamic_threshold: random rows with and without guidance, against sorting the equations' values. An order statistic
// moves by no more than the values do, so their largest rounding error bounds that of s.
#include "cpu/dynamic_threshold.h"

#include <algorithm>

#include "tests/threshold_case.h"

namespace diffkern::tests {
namespace {

Bounded magnitude(const ThresholdCase& step, int64_t sample, int64_t i) {
    const Arithmetic arithmetic = arithmetic_of(step.x.buffer.dtype());
    const auto exactly = [&](double value) { return Bounded(value, arithmetic); };
    Bounded m = exactly(step.uncond.at(sample, i));
    if (step.guided) {
        m = m + coefficient(step.guidance_scale, arithmetic) * (exactly(step.cond.at(sample, i)) - m);
        m = m * coefficient(step.rescale[static_cast<size_t>(sample)], arithmetic);
    }
    const auto term = [&](double factor, const Bounded& value) {
        return factor == 0 ? exactly(0) : coefficient(factor, arithmetic) * value;
    };
    const double* c = step.coefficients(sample);
    const Bounded x0 = term(c[0], exactly(step.x.at(sample, i))) + term(c[1], m);
    return {std::fabs(x0.value), x0.error, arithmetic};
}

void check(const ThresholdCase& step, int64_t sample) {
    std::vector<Wide> ordered;
    Wide error = 0;
    for (int64_t i = 0; i < step.x.size; ++i) {
        const Bounded value = magnitude(step, sample, i);
        ordered.push_back(std::isnan(value.value) ? HUGE_VALL : value.value);
        error = std::fmax(error, value.error);
    }
    std::sort(ordered.begin(), ordered.end());
    const double position = step.ratio * static_cast<double>(step.x.size - 1);
    const auto low = static_cast<size_t>(position), high = std::min(low + 1, ordered.size() - 1);
    const Wide fraction = position - static_cast<double>(low);
    const Wide between = fraction == 0 ? ordered[low] : ordered[low] + fraction * (ordered[high] - ordered[low]);
    const Wide expected = std::fmin(std::fmax(between, 1), step.largest);
    const double actual = step.threshold.get(sample);
    if (std::isinf(ordered[high])) {
        CHECK(std::isnan(actual), "s of sample ", sample, " is ", actual, " where the quantile is a NaN");
        return;
    }
    CHECK(std::fabs(actual - expected) <= error + 4 * ulp(expected, 53), "s of sample ", sample, ": ", actual, " for ",
          expected, " +- ", error, ", ", describe(step.shape), " ratio ", step.ratio);
}

}  // namespace

TEST(dynamic_threshold, is_the_quantile) {
    Random random(31);
    for (int round = 0; round < 3; ++round)
        for (const SampleShape& shape : shapes())
            for (const DType dtype : kDtypes) {
                const ThresholdCase step(shape, dtype, random);
                dynamic_threshold(step.args(1));
                for (int64_t sample = 0; sample < shape.samples; ++sample) check(step, sample);
            }
}

TEST(dynamic_threshold, every_rank_among_equal_values) {
    Random random(32);
    for (const int64_t size : {1, 31, 32, 33, 64, 100, 2049})
        for (const double ratio : {0.01, 0.3, 0.5, 0.97, 0.99, 1.0}) {
            ThresholdCase step({2, 1, size, false}, DType::f32, random);
            for (int64_t i = 0; i < step.x.buffer.count(); ++i)
                step.x.buffer.set(i, static_cast<double>(random.below(3) + 1));
            for (int64_t i = 0; i < step.uncond.buffer.count(); ++i) step.uncond.buffer.set(i, 0);
            step.guided = false;
            step.ratio = ratio;
            dynamic_threshold(step.args(1));
            for (int64_t sample = 0; sample < 2; ++sample) check(step, sample);
        }
}

}  // namespace diffkern::tests
