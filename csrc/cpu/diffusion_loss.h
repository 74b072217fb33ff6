#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/operand.h"
#include "cpu/sample_sums.h"

namespace diffkern {

enum class LossTarget : int { eps = 0, x0 = 1, v = 2 };

struct DiffusionLossArgs {
    SampleShape shape;
    LossTarget target;
    Operand model_output;
    Operand x0;     // null for target eps
    Operand noise;  // given; or null and generated from `source`, unless the target is x0
    NoiseArgs source;
    const int64_t* t;
    const double* sqrt_alphas_cumprod;
    const double* sqrt_one_minus_alphas_cumprod;
    const double* weight;  // (N,) or null
    const double* scale;   // (N,) or one number; of the gradient alone
    bool scale_per_sample;
    double* partial_sums;  // room for kSampleParts a sample
    float* loss;           // (N,)
    Operand grad;          // null for the loss alone
    int num_threads;
};

DIFFKERN_DISPATCH(diffusion_loss, DiffusionLossArgs)

}  // namespace diffkern
