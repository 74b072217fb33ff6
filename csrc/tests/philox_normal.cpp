// philox_normal: every storage type, memory order and length against the definition.
#include "cpu/philox_normal.h"

#include "tests/pointwise.h"

namespace diffkern::tests {

TEST(philox_normal, is_the_definition) {
    Random random(3);
    for (const SampleShape& shape_of : shapes())
        for (const bool channels_last : {false, true})
            for (const DType dtype : kDtypes) {
                const SampleShape shape = in_format(shape_of, channels_last);
                const Source source(shape.samples, random);
                Tensor out(dtype, shape, random.below(4), random.below(2));
                philox_normal({shape, source.args(), out.operand(), nullptr, 1});
                for (int64_t sample = 0; sample < shape.samples; ++sample)
                    for (int64_t i = 0; i < out.size; ++i) {
                        const Bounded z = noise_at(source.args(), shape, sample, i, dtype);
                        // A float32 or float64 is what was computed: it is not rounded once more.
                        const bool right = dtype == DType::bf16 || dtype == DType::f16
                                               ? z.allows(out.at(sample, i), dtype)
                                               : std::fabs(out.at(sample, i) - z.value) <= z.error;
                        CHECK(right, describe(shape), " ", name_of(dtype), " sample ", sample, " position ", i, ": ",
                              out.at(sample, i), " for ", z.value);
                    }
                CHECK(out.gaps_are_untouched(), describe(shape));
            }
}

TEST(philox_normal, no_samples) {
    Random random(4);
    const Source source(1, random);
    philox_normal({{0, 3, 5, false}, source.args(), {}, nullptr, 1});
    philox_normal({{2, 3, 0, true}, source.args(), {}, nullptr, 1});
}

}  // namespace diffkern::tests
