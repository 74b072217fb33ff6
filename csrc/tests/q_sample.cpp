// q_sample: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, eps given or generated, in every type and memory order.
#include "cpu/q_sample.h"

#include "tests/pointwise.h"

namespace diffkern::tests {
namespace {

constexpr int64_t kTimesteps = 5;

void check_case(const SampleShape& shape, DType dtype, bool generated, Random& random) {
    Tensor x0(operand_dtype(dtype, random), shape, random.below(4), random.below(2), random.below(4) == 0);
    Tensor eps(operand_dtype(dtype, random), shape, random.below(4), random.below(2), random.below(4) == 0);
    x0.fill(random, -1, 1);
    eps.fill(random, -3, 3);
    const Source source(shape.samples, random);
    std::vector<double> signal, sigma;
    for (int64_t i = 0; i < kTimesteps; ++i) {
        signal.push_back(random.real(0, 1));
        sigma.push_back(std::sqrt(1 - signal.back() * signal.back()));
    }
    std::vector<int64_t> t;
    for (int64_t i = 0; i < shape.samples; ++i) t.push_back(random.below(kTimesteps));

    Tensor x_t(dtype, shape, random.below(4), random.below(2));
    Tensor noise_out(operand_dtype(dtype, random), shape, random.below(4), random.below(2));
    const bool return_noise = random.coin();
    QSampleArgs args{shape, x0.operand(), {}, {}, t.data(), signal.data(), sigma.data(), x_t.operand(), {}, 1};
    if (generated) {
        args.source = source.args();
    } else {
        args.noise = eps.operand();
    }
    if (return_noise) args.noise_out = noise_out.operand();
    q_sample(args);

    const Arithmetic arithmetic = arithmetic_of(dtype);
    for (int64_t sample = 0; sample < shape.samples; ++sample) {
        const auto step = static_cast<size_t>(t[static_cast<size_t>(sample)]);
        const Bounded a = coefficient(signal[step], arithmetic), b = coefficient(sigma[step], arithmetic);
        for (int64_t i = 0; i < x_t.size; ++i) {
            const Bounded z =
                generated ? noise_at(source.args(), shape, sample, i, dtype) : Bounded(eps.at(sample, i), arithmetic);
            const Bounded expected = a * Bounded(x0.at(sample, i), arithmetic) + b * z;
            CHECK(expected.allows(x_t.at(sample, i), dtype), describe(shape), " ", name_of(dtype), " sample ", sample,
                  " position ", i, ": ", x_t.at(sample, i), " for ", expected.value);
            CHECK(!return_noise || z.allows(noise_out.at(sample, i), noise_out.buffer.dtype()), describe(shape),
                  " noise of sample ", sample, " position ", i, ": ", noise_out.at(sample, i), " for ", z.value);
        }
    }
    CHECK(x_t.gaps_are_untouched() && noise_out.gaps_are_untouched(), describe(shape));
}

}  // namespace

TEST(q_sample, is_the_formula) {
    Random random(5);
    for (const SampleShape& shape : shapes())
        for (const bool channels_last : {false, true})
            for (const DType dtype : kDtypes)
                for (const bool generated : {false, true})
                    check_case(in_format(shape, channels_last), dtype, generated, random);
}

}  // namespace diffkern::tests
