// Outputs in recycled memory, handed to Python as DLPack capsules: whoever consumes one calls its deleter when the last
// tensor on that memory is gone, which is when it is free again.
#include "cpu/recycled.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/dlpack.h"
#include "common/dtype.h"

namespace diffkern {

namespace py = pybind11;

namespace {

struct Output {
    dlpack::ManagedTensor managed;
    std::vector<int64_t> shape, strides;
    int64_t bytes;
};

void release(dlpack::ManagedTensor* managed) {
    const std::unique_ptr<Output> output(static_cast<Output*>(managed->context));
    give_back(output->managed.tensor.data, output->bytes);
}

dlpack::DataType type_of(DType dtype) {
    const auto bits = static_cast<uint8_t>(8 * size_of(dtype));
    return {dtype == DType::bf16 ? dlpack::kBfloat : dlpack::kFloat, bits, 1};
}

}  // namespace

void bind_recycled(py::module_& m) {
    m.def("recyclable", &recyclable, py::arg("bytes"));
    m.def("recycled_bytes", &kept_bytes);
    m.def(
        "recycled",
        [](int dtype, std::vector<int64_t> shape, std::vector<int64_t> strides) {
            auto output = std::make_unique<Output>();
            int64_t numel = 1;
            for (const int64_t size : shape) numel *= size;
            output->bytes = numel * size_of(static_cast<DType>(dtype));
            output->shape = std::move(shape);
            output->strides = std::move(strides);
            void* const data = take(output->bytes);
            if (!data) throw std::bad_alloc();
            output->managed = {{data,
                                {dlpack::kCPU, 0},
                                static_cast<int32_t>(output->shape.size()),
                                type_of(static_cast<DType>(dtype)),
                                output->shape.data(),
                                output->strides.data(),
                                0},
                               output.get(),
                               release};
            dlpack::ManagedTensor* const managed = &output.release()->managed;
            return py::capsule(managed, dlpack::kTensorCapsuleName, [](PyObject* capsule) {
                // A consumer renames the capsule, and owns the tensor from then on.
                if (!PyCapsule_IsValid(capsule, dlpack::kTensorCapsuleName)) return;
                auto* const unused =
                    static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kTensorCapsuleName));
                unused->deleter(unused);
            });
        },
        py::arg("dtype"), py::arg("shape"), py::arg("strides"),
        "A DLPack capsule of an output, dense with these strides, contents anything.");
}

}  // namespace diffkern
