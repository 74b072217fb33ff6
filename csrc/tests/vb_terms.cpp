// vb_terms: the terms and their gradient, for every kind of target, variance, decoder, type and memory order.
#include "tests/vb_terms_case.h"

namespace diffkern::tests {
namespace {

// What float32 arithmetic of some ten operations and two elementary functions leaves of a value; the elements of a
// sample are of one size. The tests in Python hold the last digits.
constexpr Wide kTolerance = 2e-5L;

void check_sums(const VbTermsCase& bound, int64_t sample) {
    Wide sums[kVbTerms] = {}, sizes[kVbTerms] = {};
    const Wide size = static_cast<Wide>(bound.x0.size);
    for (int64_t i = 0; i < bound.x0.size; ++i) {
        const VbTermsCase::Element e = bound.expected(sample, i);
        const Wide values[kVbTerms] = {e.square, e.bound / (2 * std::log(2.0L)), e.x0_square};
        for (int k = 0; k < kVbTerms; ++k) {
            sums[k] += values[k] / size;
            sizes[k] += std::fabs(values[k]) / size;
        }
    }
    for (int k = 0; k < kVbTerms; ++k) {
        const double actual = bound.terms.get(sample * kVbTerms + k);
        CHECK(std::fabs(actual - sums[k]) <= kTolerance * sizes[k] + 1e-7L, bound.describe(), " term ", k,
              " of sample ", sample, ": ", actual, " for ", sums[k]);
    }
}

void check_grad(const VbTermsCase& bound, int64_t sample) {
    Wide largest = 0;
    for (int64_t i = 0; i < bound.x0.size; ++i) {
        const VbTermsCase::Element e = bound.expected(sample, i);
        largest = std::fmax(largest, std::fmax(std::fabs(e.of_mean), std::fabs(e.of_variance)));
    }
    const DType dtype = bound.grad_mean.buffer.dtype();
    auto check = [&](const char* what, double actual, Wide wanted, int64_t i) {
        const Wide error = kTolerance * largest;
        const Wide allowed = error + storage_rounding(dtype, std::fabs(wanted) + error);
        CHECK(std::fabs(actual - wanted) <= allowed, bound.describe(), " gradient of the ", what, " of sample ", sample,
              " position ", i, ": ", actual, " for ", wanted);
    };
    for (int64_t i = 0; i < bound.x0.size; ++i) {
        const VbTermsCase::Element e = bound.expected(sample, i);
        check("mean", bound.grad_mean.at(sample, i), e.of_mean, i);
        if (bound.learned) check("variance", bound.grad_variance.at(sample, i), e.of_variance, i);
    }
}

// The terms alone first, then with the gradient: which gives the same terms.
void check_case(const VbTermsCase& bound) {
    vb_terms(bound.args(false, 1));
    const Buffer alone = bound.terms;
    vb_terms(bound.args(true, 1));
    CHECK(bound.terms.same_bits(alone), bound.describe(), ": other terms with the gradient");
    for (int64_t sample = 0; sample < bound.shape.samples; ++sample) {
        check_sums(bound, sample);
        check_grad(bound, sample);
    }
    CHECK(bound.grad_mean.gaps_are_untouched() && (!bound.learned || bound.grad_variance.gaps_are_untouched()),
          bound.describe());
}

}  // namespace

TEST(vb_terms, is_the_formula) {
    Random random(51);
    for (const SampleShape& shape : shapes())
        for (const bool channels_last : {false, true})
            for (const DType dtype : kFloat32AndBelow)
                for (const Made made : kMade)
                    check_case(
                        {in_format(shape, channels_last), made, random.coin(), random.below(4) == 0, dtype, random});
}

// More chunks in a sample than it has parts.
TEST(vb_terms, large_samples) {
    Random random(52);
    for (const bool learned : {false, true})
        check_case({{2, 3, 50001, learned}, Made::of_y, learned, false, DType::f32, random});
}

TEST(vb_terms, nan_stays_in_its_sample) {
    Random random(53);
    for (const bool learned : {false, true})
        for (const Made made : kMade) {
            VbTermsCase bound({3, 3, 7, false}, made, learned, false, DType::f32, random);
            Tensor& bad = learned ? bound.variance : bound.mean;
            if (bad.stride == 0) continue;  // broadcast: it is in all of them
            bad.buffer.set(bad.stride + 20, std::nan(""));
            vb_terms(bound.args(true, 1));
            CHECK(std::isnan(bound.terms.get(kVbTerms + 1)), bound.describe());
            for (const int64_t sample : {0, 2}) {
                check_sums(bound, sample);
                check_grad(bound, sample);
            }
        }
}

TEST(vb_terms, empty) {
    Random random(54);
    for (const SampleShape& shape : {SampleShape{2, 3, 0, false}, {2, 0, 3, true}}) {
        const VbTermsCase bound(shape, Made::of_both, true, false, DType::f32, random);
        vb_terms(bound.args(true, 1));
        for (int64_t k = 0; k < 2 * kVbTerms; ++k) CHECK(std::isnan(bound.terms.get(k)), bound.describe());
    }
    VbTermsArgs none{};
    none.shape = {0, 3, 5, false};
    none.levels = 256;
    none.num_threads = 1;
    vb_terms(none);
}

}  // namespace diffkern::tests
