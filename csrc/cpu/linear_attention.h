#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace diffkern {

// (samples, heads, channels of a head, positions) in any memory order, the strides in elements.
struct HeadsView {
    char* data;
    DType dtype;
    int64_t sample, head, channel, position;
};

struct LinearAttentionShape {
    int64_t samples, heads, channels, positions;
    int64_t remembered;  // keys of the memory, 0 without one
};

struct LinearAttentionArgs {
    LinearAttentionShape shape;
    HeadsView q, k, v;
    HeadsView memory_k, memory_v;  // without a stride between samples
    float scale;
    HeadsView out;
    // Written by the forward pass and read by the backward pass: (samples, heads, channels, channels), its rows those
    // of the keys; and (samples, heads, channels) twice.
    float *context, *k_max, *k_sum;
    int num_threads;
};

struct LinearAttentionBackwardArgs {
    LinearAttentionArgs forward;  // out is unused
    HeadsView dout, dq, dk, dv;
    float* dmemory;  // (2, heads, channels, remembered)
};

DIFFKERN_DISPATCH(linear_attention, LinearAttentionArgs)
DIFFKERN_DISPATCH(linear_attention_backward, LinearAttentionBackwardArgs)

}  // namespace diffkern
