#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/operand.h"

namespace diffkern {

struct QSampleArgs {
    SampleShape shape;
    Operand x0;
    Operand noise;  // given; or null and generated from `source`
    NoiseArgs source;
    const int64_t* t;
    const double* sqrt_alphas_cumprod;
    const double* sqrt_one_minus_alphas_cumprod;
    Operand x_t;
    Operand noise_out;  // null unless the caller wants the noise
    int num_threads;
};

DIFFKERN_DISPATCH(q_sample, QSampleArgs)

}  // namespace diffkern
