// The small parameters of a normalisation, in any strides and storage type.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace diffkern {

// (C,) with sample_stride 0, or (N, C) with any strides. Null where the call has none.
struct Parameter {
    const char* data = nullptr;
    DType dtype = DType::f32;
    int64_t sample_stride = 0, channel_stride = 0;  // in elements

    explicit operator bool() const {
        return data != nullptr;
    }
};

}  // namespace diffkern

#ifdef DIFFKERN_ISA
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// parameter[sample, first .. first + count) as float32.
template <class T>
void load_row(const Parameter& p, int64_t sample, int64_t first, int64_t count, float* out) {
    const T* data = reinterpret_cast<const T*>(p.data) + sample * p.sample_stride + first * p.channel_stride;
    if (p.channel_stride == 1)
        for_lanes(0, count, [&](int64_t i, int n) DIFFKERN_LAMBDA { store_n(out + i, load_n(data + i, n), n); });
    else
        for (int64_t i = 0; i < count; ++i) out[i] = to_float(data[i * p.channel_stride]);
}
inline void load_row(const Parameter& p, int64_t sample, int64_t first, int64_t count, float absent, float* out) {
    if (!p)
        for (int64_t i = 0; i < count; ++i) out[i] = absent;
    else if (p.dtype == DType::bf16)
        load_row<bf16>(p, sample, first, count, out);
    else if (p.dtype == DType::f16)
        load_row<f16>(p, sample, first, count, out);
    else
        load_row<float>(p, sample, first, count, out);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
#endif
