#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/operand.h"

namespace diffkern {

struct DynamicThresholdArgs {
    SampleShape shape;
    Operand x, uncond, cond;  // without guidance only `uncond`
    const double* table;      // (rows, columns) of solver_step, of which a_x and a_m are read
    int64_t num_columns;
    const int64_t* row;  // one, or one per sample
    bool row_per_sample;
    const double* guidance_scale;  // one or one per sample, with `cond`
    bool guidance_per_sample;
    const double* guidance_rescale;  // r_n per sample, or null
    double ratio, largest;
    void* scratch;      // float64 if x is, else float32; `threshold_scratch` values for each of num_tasks
    double* threshold;  // s_n, 1 for an empty sample
    int num_tasks;
};

// How many values of scratch a sample of `count` values takes on any instruction set.
constexpr int64_t threshold_scratch(int64_t count) {
    return (count + 15) / 16 * 16;
}

DIFFKERN_DISPATCH(dynamic_threshold, DynamicThresholdArgs)

}  // namespace diffkern
