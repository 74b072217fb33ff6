#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/parameter.h"

namespace diffkern {

struct ChannelRmsNormArgs {
    SampleShape shape;
    DType dtype;  // of x, y, dy, dx
    const char* x;
    Parameter weight, scale, shift;
    float eps;
    bool silu;
    char* y;
    float* norm;  // (N, pixels), not yet held to eps: written by the forward pass and read by the backward pass
    int num_threads;
};

struct ChannelRmsNormBackwardArgs {
    ChannelRmsNormArgs forward;  // y is unused
    const char* dy;
    char* dx;
    float *weight, *scale, *shift;  // the gradients, (C,) and (N, C) contiguous; null where not wanted
};

DIFFKERN_DISPATCH(channel_rms_norm, ChannelRmsNormArgs)
DIFFKERN_DISPATCH(channel_rms_norm_backward, ChannelRmsNormBackwardArgs)

}  // namespace diffkern
