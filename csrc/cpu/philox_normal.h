#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/operand.h"

namespace diffkern {

struct PhiloxArgs {
    SampleShape shape;
    NoiseArgs noise;
    Operand out;            // normals; or
    int64_t* out_integers;  // the raw words, contiguous
    int num_threads;
};

DIFFKERN_DISPATCH(philox_normal, PhiloxArgs)
void philox_uint32(const PhiloxArgs&);

}  // namespace diffkern
