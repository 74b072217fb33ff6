#include "bindings/tensor.h"

#include <algorithm>
#include <stdexcept>

namespace diffkern {
namespace {

// What is taken from torch once; it lives as long as the interpreter, so the references are never given back.
struct Torch {
    PyObject *tensor_type = nullptr, *parameter_type = nullptr;
    PyObject *empty_like = nullptr, *empty = nullptr, *float32 = nullptr, *cpu = nullptr;
    PyObject *requires_grad = nullptr, *is_neg = nullptr, *empty_keywords = nullptr;
    const dlpack::ExchangeApi* api = nullptr;
};
Torch g_torch;

PyObject* kept(py::object object) {
    return object.release().ptr();
}

// True if torch has the table, so that views can be had at all.
bool use_torch(const py::object& torch) {
    const py::object tensor_type = torch.attr("Tensor");
    if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return false;
    const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName)) return false;
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
    if (api->header.version.major != dlpack::kMajorVersion || api->view == nullptr) return false;
    g_torch.tensor_type = kept(tensor_type);
    g_torch.parameter_type = kept(torch.attr("nn").attr("Parameter"));
    g_torch.empty_like = kept(torch.attr("empty_like"));
    g_torch.empty = kept(torch.attr("empty"));
    g_torch.float32 = kept(torch.attr("float32"));
    g_torch.cpu = kept(torch.attr("device")("cpu"));
    g_torch.requires_grad = kept(py::str("requires_grad"));
    g_torch.is_neg = kept(py::str("is_neg"));
    g_torch.empty_keywords = kept(py::make_tuple("dtype", "device"));
    g_torch.api = api;
    return true;
}

py::object owned(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

std::optional<DType> floating(dlpack::DataType dtype) {
    if (dtype.lanes != 1) return {};
    if (dtype.code == dlpack::kBfloat && dtype.bits == 16) return DType::bf16;
    if (dtype.code != dlpack::kFloat) return {};
    switch (dtype.bits) {
        case 16: return DType::f16;
        case 32: return DType::f32;
        case 64: return DType::f64;
        default: return {};
    }
}

}  // namespace

int64_t TensorView::numel() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= shape[i];
    return count;
}

bool TensorView::contiguous() const {
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; expected *= shape[i], --i)
        if (shape[i] != 1 && strides[i] != expected) return false;
    return true;
}

bool TensorView::same_shape(const TensorView& other) const {
    return rank == other.rank && std::equal(shape, shape + rank, other.shape);
}

bool TensorView::channels_last() const {
    if (rank < 3) return false;
    if (shape[1] != 1 && strides[1] != 1) return false;
    int64_t expected = shape[1];
    for (int i = rank - 1; i >= 0; --i) {
        if (i == 1) continue;
        if (shape[i] != 1 && strides[i] != expected) return false;
        expected *= shape[i];
    }
    return true;
}

std::optional<TensorView> view_of(const py::handle& tensor) {
    const auto view = view_of_new(tensor);
    // Negation that torch puts off until the values are read (a conjugate's imaginary part) is not in the memory.
    if (view && owned(PyObject_CallMethodNoArgs(tensor.ptr(), g_torch.is_neg)).ptr() != Py_False) return {};
    return view;
}

std::optional<TensorView> view_of_new(const py::handle& tensor) {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    if (g_torch.api == nullptr || (type != g_torch.tensor_type && type != g_torch.parameter_type)) return {};
    dlpack::Tensor t;
    if (g_torch.api->view(tensor.ptr(), &t) != 0) {
        PyErr_Clear();  // a tensor that DLPack cannot show, or one without memory
        return {};
    }
    const auto dtype = floating(t.dtype);
    if (t.device.type != dlpack::kCPU || !dtype) return {};
    const TensorView view{static_cast<char*>(t.data) + t.byte_offset, *dtype, t.rank, t.shape, t.strides};
    // Zeros that autograd only promises, and storage that was freed, have sizes but no memory.
    if (t.data == nullptr && view.numel() != 0) return {};
    return view;
}

bool requires_grad(const py::handle& tensor) {
    return owned(PyObject_GetAttr(tensor.ptr(), g_torch.requires_grad)).is(py::handle(Py_True));
}

py::object empty_like(const py::handle& tensor) {
    return owned(PyObject_CallOneArg(g_torch.empty_like, tensor.ptr()));
}

py::object empty_float32(const py::tuple& shape) {
    PyObject* args[] = {shape.ptr(), g_torch.float32, g_torch.cpu};
    return owned(PyObject_Vectorcall(g_torch.empty, args, 1, g_torch.empty_keywords));
}

void bind_tensor(py::module_& m) {
    m.def("use_torch", &use_torch, py::arg("torch"),
          "Hands the module torch; whether its tensors can be seen without Python (see csrc/bindings/tensor.h).");
}

}  // namespace diffkern
