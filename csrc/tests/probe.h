// vec.h and normal.h exist once per instruction set inside kernels; these functions let the tests call their pieces on
// plain arrays. Arrays may have any length, each piece is used as a kernel uses it.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace diffkern {

struct LanesProbe {
    int* lanes;
};

// out[i] = in[i], converted through float32 (float64: both are).
struct CopyProbe {
    DType from, to;
    const char* in;
    char* out;
    int64_t count;
};

// All lanes of load_partial(in, n), as float32 or float64.
struct PartialProbe {
    DType dtype;
    const char* in;
    int n;
    char* lanes;
};

enum class Function { exp_clamped, silu, sqrt };
struct MapProbe {
    Function function;
    const float* x;
    float* y;
    int64_t count;
};

// Of one vector.
struct SumProbe {
    const float* x;
    float* total;
};

// The two normals of each pair of words.
struct BoxMullerProbe {
    const uint32_t *radius, *angle;
    float *first, *second;
    int64_t count;
};

DIFFKERN_DISPATCH(probe_lanes, LanesProbe)
DIFFKERN_DISPATCH(probe_copy, CopyProbe)
DIFFKERN_DISPATCH(probe_partial, PartialProbe)
DIFFKERN_DISPATCH(probe_map, MapProbe)
DIFFKERN_DISPATCH(probe_sum, SumProbe)
DIFFKERN_DISPATCH(probe_box_muller, BoxMullerProbe)

}  // namespace diffkern
