// Python's tensors as the kernels see them, without torch's headers and without a Python call for every size and
// stride: through the DLPack table that torch's tensor type carries. Where the table is missing, or a tensor is not
// plain, there is no view and the caller takes the road through diffkern/ops/<op>/native.py.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "bindings/dlpack.h"
#include "common/dtype.h"
#include "cpu/noise.h"

namespace diffkern {

namespace py = pybind11;

struct TensorView {
    char* data;
    DType dtype;
    int32_t rank;
    const int64_t *shape, *strides;

    int64_t numel() const;
    bool contiguous() const;
    bool same_shape(const TensorView& other) const;
    // (N, C, *spatial) in memory as (N, *spatial, C)
    bool channels_last() const;
};

// The view of a torch.Tensor or Parameter (no subclass) in CPU memory, with a floating dtype; nothing for all else.
std::optional<TensorView> view_of(const py::handle& tensor);

// The same for a tensor that was made here.
std::optional<TensorView> view_of_new(const py::handle& tensor);

// Whether autograd follows a tensor that `view_of` takes.
bool requires_grad(const py::handle& tensor);

// torch.empty_like(tensor)
py::object empty_like(const py::handle& tensor);

// A new contiguous float32 tensor.
py::object empty_float32(const py::tuple& shape);

void bind_tensor(py::module_& m);

}  // namespace diffkern
