// A tensor as a pointwise kernel sees it: N samples, each dense in the common memory order, a stride between samples
// (0 for a broadcast sample), any storage type. The type is a run-time switch, not a template: the branch is the same
// for a whole call, and the kernels wait for memory anyway.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace diffkern {

struct Operand {
    char* data = nullptr;
    DType dtype = DType::f32;
    int64_t sample_stride = 0;  // in elements

    explicit operator bool() const {
        return data != nullptr;
    }
};

}  // namespace diffkern

#ifdef DIFFKERN_ISA
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// Where one sample starts, with the conversion to and from the arithmetic's type (float or double).
template <class Real>
struct Cursor;

template <>
struct Cursor<float> {
    char* base;
    DType dtype;

    Cursor(const Operand& op, int64_t sample)
        : base(op.data + (op.data ? sample * op.sample_stride * size_of(op.dtype) : 0)), dtype(op.dtype) {
    }

    DIFFKERN_INLINE f32v load(int64_t i, int n) const {
        switch (dtype) {
            case DType::bf16: return load_n(reinterpret_cast<const bf16*>(base) + i, n);
            case DType::f16: return load_n(reinterpret_cast<const f16*>(base) + i, n);
            default: return load_n(reinterpret_cast<const float*>(base) + i, n);
        }
    }
    DIFFKERN_INLINE void store(int64_t i, f32v v, int n) const {
        switch (dtype) {
            case DType::bf16: return store_n(reinterpret_cast<bf16*>(base) + i, v, n);
            case DType::f16: return store_n(reinterpret_cast<f16*>(base) + i, v, n);
            default: return store_n(reinterpret_cast<float*>(base) + i, v, n);
        }
    }
};

// float64 arithmetic takes float64 operands only; the Python side converts.
template <>
struct Cursor<double> {
    char* base;

    Cursor(const Operand& op, int64_t sample) : base(op.data + (op.data ? sample * op.sample_stride * 8 : 0)) {
    }

    DIFFKERN_INLINE f64v load(int64_t i, int n) const {
        return load_n(reinterpret_cast<const double*>(base) + i, n);
    }
    DIFFKERN_INLINE void store(int64_t i, f64v v, int n) const {
        store_n(reinterpret_cast<double*>(base) + i, v, n);
    }
};

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
#endif
