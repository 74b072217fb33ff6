// The part of DLPack's ABI (version 1, https://dmlc.github.io/dlpack) by which a tensor library shows its tensors to C
// code: the plain tensor, one with its owner, and the table of functions in the capsule `__dlpack_c_exchange_api__` of
// a tensor type.
#pragma once

#include <cstdint>

namespace diffkern {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr int32_t kCPU = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Device {
    int32_t type, id;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t rank;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

// A tensor that is handed over in a capsule of the name "dltensor".
struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor* self);
};
constexpr const char* kTensorCapsuleName = "dltensor";

struct ExchangeApi {
    struct {
        struct {
            uint32_t major, minor;
        } version;
        void* older;
    } header;
    // Allocation and owning exchange: not used here.
    void *allocate, *from_python, *to_python;
    // Fills in a view that lives as long as the Python object; 0, or -1 with a Python exception set. May be null.
    int (*view)(void* python_object, Tensor* out);
    void* current_stream;
};

}  // namespace dlpack
}  // namespace diffkern
