#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/operand.h"

namespace diffkern {

struct GuidanceRescaleArgs {
    SampleShape shape;             // of one half: samples and the mean's channels, at least two values a sample
    Operand uncond, cond;          // both of one dtype
    const double* guidance_scale;  // one, or one per sample
    bool guidance_per_sample;
    double phi;
    double* rescale;  // r_n
    int num_threads;
};

DIFFKERN_DISPATCH(guidance_rescale, GuidanceRescaleArgs)

}  // namespace diffkern
