// A tensor as a pointwise kernel sees it: N samples, each dense in the common memory order, a stride between samples
// (0 for a broadcast sample), any storage type.
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
    bool absent_or(DType wanted) const {
        return data == nullptr || dtype == wanted;
    }
};

}  // namespace diffkern

#ifdef DIFFKERN_ISA
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// Where one sample starts, with the conversion from the storage type to the arithmetic's (float or double). `Plain` is
// for a call whose operands are all of that type; `Cursor` takes any storage type, for a branch at every access.
template <class Real>
struct Plain {
    char* base;

    Plain(const Operand& op, int64_t sample)
        : base(op.data + (op.data ? sample * op.sample_stride * static_cast<int64_t>(sizeof(Real)) : 0)) {
    }

    DIFFKERN_INLINE Vec<Real> load(int64_t i, int n) const {
        return load_n(reinterpret_cast<const Real*>(base) + i, n);
    }
    DIFFKERN_INLINE void store(int64_t i, Vec<Real> v, int n) const {
        store_n(reinterpret_cast<Real*>(base) + i, v, n);
    }
};

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
struct Cursor<double> : Plain<double> {
    using Plain<double>::Plain;
};

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
#endif
