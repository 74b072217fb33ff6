// What the bindings of all ops share: from Python's tuples of addresses, sizes and strides to the kernels' arguments.
// Callers (diffkern/ops/<op>/native.py) have checked every shape and dtype; only index values are checked in here,
// where the data are.
//
//   shape    (samples, channels, pixels, channels_last)
//   operand  (address, dtype code, elements between samples), or None
//   param    (address, dtype code, elements between samples, elements between channels), or None
//   source   (seed address, draw address, draw per sample, samples address, index per sample, stream), or None
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "common/dtype.h"
#include "cpu/noise.h"
#include "cpu/operand.h"
#include "cpu/parameter.h"

namespace diffkern {

namespace py = pybind11;

template <class T>
inline T* pointer(const py::handle& address) {
    return address.is_none() ? nullptr : reinterpret_cast<T*>(address.cast<std::uintptr_t>());
}

inline DType dtype_of(const py::handle& code) {
    return static_cast<DType>(code.cast<int>());
}

inline SampleShape shape_of(const py::tuple& t) {
    return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<bool>()};
}

inline Operand operand_of(const py::handle& o) {
    if (o.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(o);
    return {pointer<char>(t[0]), dtype_of(t[1]), t[2].cast<int64_t>()};
}

inline Parameter parameter_of(const py::handle& o) {
    if (o.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(o);
    if (pointer<const char>(t[0]) == nullptr) throw std::invalid_argument("a parameter has no memory");
    return {pointer<const char>(t[0]), dtype_of(t[1]), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

inline NoiseArgs source_of(const py::handle& o) {
    if (o.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(o);
    return {pointer<const int64_t>(t[0]),
            pointer<const int64_t>(t[1]),
            t[2].cast<bool>(),
            pointer<const int64_t>(t[3]),
            t[4].cast<bool>(),
            t[5].cast<int64_t>()};
}

}  // namespace diffkern
