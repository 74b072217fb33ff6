#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace diffkern {

// A tensor (B, H, rows, d) with any strides, in elements.
struct AttentionView {
    char* data;
    int64_t batch_stride, head_stride, row_stride, channel_stride;
};

struct AttentionArgs {
    int64_t batch, heads, queries, keys, head_dim;  // all at least 1
    DType dtype;                                    // of all tensors but lse: float32, bfloat16 or float16
    AttentionView q, k, v, out;
    // (2, B, H, T): ln of the sum of exp(scale q k) per query is the sum of two numbers, the largest score, rounded,
    // and the rest. Written by the forward pass, unless null.
    float* lse;
    double scale;
    int num_threads;
};

struct AttentionBackwardArgs {
    AttentionArgs forward;  // out and lse are read
    AttentionView dout, dq, dk, dv;
};

DIFFKERN_DISPATCH(attention, AttentionArgs)
DIFFKERN_DISPATCH(attention_backward, AttentionBackwardArgs)

}  // namespace diffkern
