#include "cpu/attention.h"

#include "bindings/convert.h"

namespace diffkern {
namespace {

// (address, strides of sample, head, row and channel in elements)
AttentionView attention_view(const py::tuple& t) {
    return {pointer<char>(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
            t[4].cast<int64_t>()};
}

// sizes: (B, H, T, K, d)
AttentionArgs attention_args(const py::tuple& sizes, int dtype, const py::tuple& q, const py::tuple& k,
                             const py::tuple& v, const py::tuple& out, const py::handle& lse, double scale,
                             int num_threads) {
    return {sizes[0].cast<int64_t>(),
            sizes[1].cast<int64_t>(),
            sizes[2].cast<int64_t>(),
            sizes[3].cast<int64_t>(),
            sizes[4].cast<int64_t>(),
            static_cast<DType>(dtype),
            attention_view(q),
            attention_view(k),
            attention_view(v),
            attention_view(out),
            pointer<float>(lse),
            scale,
            num_threads};
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def(
        "attention",
        [](const py::tuple& sizes, int dtype, const py::tuple& q, const py::tuple& k, const py::tuple& v,
           const py::tuple& out, const py::handle& lse, double scale, int num_threads) {
            const AttentionArgs args = attention_args(sizes, dtype, q, k, v, out, lse, scale, num_threads);
            py::gil_scoped_release release;
            attention(args);
        },
        py::arg("sizes"), py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("scale"), py::arg("num_threads"));
    m.def(
        "attention_backward",
        [](const py::tuple& sizes, int dtype, const py::tuple& q, const py::tuple& k, const py::tuple& v,
           const py::tuple& out, const py::handle& lse, double scale, const py::tuple& dout, const py::tuple& dq,
           const py::tuple& dk, const py::tuple& dv, int num_threads) {
            const AttentionBackwardArgs args{attention_args(sizes, dtype, q, k, v, out, lse, scale, num_threads),
                                             attention_view(dout), attention_view(dq), attention_view(dk),
                                             attention_view(dv)};
            py::gil_scoped_release release;
            attention_backward(args);
        },
        py::arg("sizes"), py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("scale"), py::arg("dout"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("num_threads"));
}

}  // namespace diffkern
