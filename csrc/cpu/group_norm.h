#pragma once

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/parameter.h"

namespace diffkern {

struct GroupNormArgs {
    SampleShape shape;  // its channels: those of x and, after them, those of skip
    int64_t num_groups;
    DType dtype;  // of x, skip, y, dy, dx, dskip
    const char *x, *skip;
    int64_t x_channels;  // the others are skip's
    Parameter weight, bias, scale, shift, offset;
    double eps;
    bool silu;
    char* y;
    float* mean;  // (N, G): written by the forward pass, unless null, and read by the backward pass
    float* rstd;  // (N, G): likewise
    int num_threads;
};

struct GroupNormBackwardArgs {
    GroupNormArgs forward;  // y is unused
    const char* dy;
    char *dx, *dskip;
    float* sum_dz;       // (N, C): sum over the pixels of dz, the gradient before the activation
    float* sum_dz_xhat;  // (N, C): of dz times the normalised value
    float* doffset;      // (N, C): of dx and dskip; null where not wanted
};

// d weight, d bias (C,) and d scale, d shift (N, C) from the two sums of the backward pass; null where not wanted.
struct GroupNormParameterArgs {
    const GroupNormBackwardArgs& backward;
    float *weight, *bias, *scale, *shift;
};

DIFFKERN_DISPATCH(group_norm, GroupNormArgs)
DIFFKERN_DISPATCH(group_norm_backward, GroupNormBackwardArgs)
DIFFKERN_DISPATCH(group_norm_parameter_gradients, GroupNormParameterArgs)

}  // namespace diffkern
