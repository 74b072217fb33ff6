#pragma once

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/noise.h"

namespace diffkern {

// A small parameter: (C,) with sample_stride 0, or (N, C) with any strides. Null where the call has none.
struct Parameter {
    const char* data = nullptr;
    DType dtype = DType::f32;
    int64_t sample_stride = 0, channel_stride = 0;  // in elements

    explicit operator bool() const {
        return data != nullptr;
    }
};

// Its value at (sample, channel) in float32, or `absent` where the call has none.
static inline float read(const Parameter& p, int64_t sample, int64_t channel, float absent) {
    if (!p) return absent;
    const int64_t i = sample * p.sample_stride + channel * p.channel_stride;
    switch (p.dtype) {
        case DType::bf16: return to_float(reinterpret_cast<const bf16*>(p.data)[i]);
        case DType::f16: return to_float(reinterpret_cast<const f16*>(p.data)[i]);
        default: return reinterpret_cast<const float*>(p.data)[i];
    }
}

struct GroupNormArgs {
    SampleShape shape;
    int64_t num_groups;
    DType dtype;  // of x, y, dy, dx
    const char* x;
    Parameter weight, bias, scale, shift;
    double eps;
    bool silu;
    char* y;
    float* mean;  // (N, G): written by the forward pass, read by the backward pass
    float* rstd;  // (N, G)
    int num_threads;
};

struct GroupNormBackwardArgs {
    GroupNormArgs forward;  // y is unused
    const char* dy;
    char* dx;
    float* sum_dz;       // (N, C): sum over the pixels of dz, the gradient before the activation
    float* sum_dz_xhat;  // (N, C): of dz times the normalised value
};

DIFFKERN_DISPATCH(group_norm, GroupNormArgs)
DIFFKERN_DISPATCH(group_norm_backward, GroupNormBackwardArgs)

// d weight, d bias (C,) and d scale, d shift (N, C) from the two sums; null where not wanted.
struct GroupNormParameterGradients {
    float *weight, *bias, *scale, *shift;
};
void group_norm_parameter_gradients(const GroupNormBackwardArgs&, const GroupNormParameterGradients&);

}  // namespace diffkern
