// What a normalisation ends with: nothing, or SiLU.
#pragma once

#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <bool kSilu>
DIFFKERN_INLINE f32v activate(f32v z) {
    return kSilu ? silu(z) : z;
}

// d act(z) / dz times dy
template <bool kSilu>
DIFFKERN_INLINE f32v activation_backward(f32v z, f32v dy) {
    return kSilu ? dy * silu_derivative(z) : dy;
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
