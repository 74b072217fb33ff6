// A random call of guidance_rescale.
#pragma once

#include "cpu/guidance_rescale.h"
#include "tests/pointwise.h"

namespace diffkern::tests {

struct RescaleCase {
    SampleShape shape;
    Tensor uncond, cond;
    std::vector<double> guidance_scale;
    double phi;
    Buffer rescale;

    RescaleCase(const SampleShape& shape, DType dtype, double mean, Random& random)
        : shape(shape),
          uncond(dtype, shape, random.below(4), random.below(2)),
          cond(dtype, shape, random.below(4), random.below(2)),
          phi(random.real(0, 1)),
          rescale(DType::f64, shape.samples) {
        // Spread widely enough that 16-bit values beside a mean differ.
        for (Tensor* tensor : {&uncond, &cond}) tensor->fill(random, mean - 100, mean + 100);
        for (int64_t i = 0; i < shape.samples; ++i) guidance_scale.push_back(random.real(1.5, 8));
    }

    GuidanceRescaleArgs args(int num_threads) const {
        return {shape, uncond.operand(),     cond.operand(), guidance_scale.data(), true,
                phi,   rescale.as<double>(), num_threads};
    }
};

}  // namespace diffkern::tests
