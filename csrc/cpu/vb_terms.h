#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/operand.h"
#include "cpu/sample_sums.h"

namespace diffkern {

// The columns of the table of coefficients; diffkern/ops/vb_terms/coefficients.py makes it.
enum VbColumn : int { kOfY, kOfX0, kX0Scale, kCoef1, kLogVar, kDeltaBias, kDeltaSlope, kVbColumns };

constexpr int kVbTerms = 3;  // mse, vb, x0_mse

struct VbTermsArgs {
    SampleShape shape;    // of x0
    Operand mean;         // the network's output, the mean's channels
    Operand variance;     // its variance's channels; null for a fixed variance
    Operand x0;
    Operand y;            // eps or x_t; null if it is generated from `source` or not read
    NoiseArgs source;
    bool reads_y;         // whether the target is made of y, given or generated
    bool x0_in_target;
    bool mean_of_x0;      // whether the mean is made of the clipped x0: not for a network that gives the mean
    bool stops_mean;      // whether the bound's gradient leaves out the mean's channels
    const int64_t* t;
    const double* coefficients;  // (T, kVbColumns)
    int64_t levels;
    bool exact;
    bool clip;
    double clip_low, clip_high;
    const double* scale;  // (kVbTerms,) or (N, kVbTerms); of the gradient alone
    bool scale_per_sample;
    double* partial_sums;  // room for kVbTerms * kSampleParts a sample
    float* terms;          // (N, kVbTerms)
    Operand grad_mean;     // null for the terms alone
    Operand grad_variance;
    int num_threads;
};

DIFFKERN_DISPATCH(vb_terms, VbTermsArgs)

}  // namespace diffkern
