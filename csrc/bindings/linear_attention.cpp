#include "cpu/linear_attention.h"

#include "bindings/convert.h"

namespace diffkern {
namespace {

// (address, dtype code, elements between samples, heads, channels and positions), or None
HeadsView heads_view(const py::handle& o) {
    if (o.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(o);
    return {pointer<char>(t[0]),  dtype_of(t[1]),       t[2].cast<int64_t>(),
            t[3].cast<int64_t>(), t[4].cast<int64_t>(), t[5].cast<int64_t>()};
}

// (samples, heads, channels of a head, positions, remembered)
LinearAttentionShape heads_shape(const py::tuple& t) {
    return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
            t[4].cast<int64_t>()};
}

}  // namespace

void bind_linear_attention(py::module_& m) {
    m.def(
        "linear_attention",
        [](const py::tuple& shape, const py::handle& q, const py::handle& k, const py::handle& v,
           const py::handle& memory_k, const py::handle& memory_v, double scale, const py::handle& out,
           const py::handle& context, const py::handle& k_max, const py::handle& k_sum, int num_threads) {
            const LinearAttentionArgs args{heads_shape(shape),
                                           heads_view(q),
                                           heads_view(k),
                                           heads_view(v),
                                           heads_view(memory_k),
                                           heads_view(memory_v),
                                           static_cast<float>(scale),
                                           heads_view(out),
                                           pointer<float>(context),
                                           pointer<float>(k_max),
                                           pointer<float>(k_sum),
                                           num_threads};
            py::gil_scoped_release release;
            linear_attention(args);
        },
        py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("memory_k"), py::arg("memory_v"),
        py::arg("scale"), py::arg("out"), py::arg("context"), py::arg("k_max"), py::arg("k_sum"),
        py::arg("num_threads"));
    m.def(
        "linear_attention_backward",
        [](const py::tuple& shape, const py::handle& q, const py::handle& k, const py::handle& v,
           const py::handle& memory_k, const py::handle& memory_v, double scale, const py::handle& context,
           const py::handle& k_max, const py::handle& k_sum, const py::handle& dout, const py::handle& dq,
           const py::handle& dk, const py::handle& dv, const py::handle& dmemory, int num_threads) {
            const LinearAttentionBackwardArgs args{{heads_shape(shape),
                                                    heads_view(q),
                                                    heads_view(k),
                                                    heads_view(v),
                                                    heads_view(memory_k),
                                                    heads_view(memory_v),
                                                    static_cast<float>(scale),
                                                    {},
                                                    pointer<float>(context),
                                                    pointer<float>(k_max),
                                                    pointer<float>(k_sum),
                                                    num_threads},
                                                   heads_view(dout),
                                                   heads_view(dq),
                                                   heads_view(dk),
                                                   heads_view(dv),
                                                   pointer<float>(dmemory)};
            py::gil_scoped_release release;
            linear_attention_backward(args);
        },
        py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("memory_k"), py::arg("memory_v"),
        py::arg("scale"), py::arg("context"), py::arg("k_max"), py::arg("k_sum"), py::arg("dout"), py::arg("dq"),
        py::arg("dk"), py::arg("dv"), py::arg("dmemory"), py::arg("num_threads"));
}

}  // namespace diffkern
