#include "bindings/convert.h"
#include "cpu/philox_normal.h"

namespace diffkern {

void bind_philox(py::module_& m) {
    m.def(
        "philox_normal",
        [](const py::tuple& shape, const py::handle& source, const py::handle& out, int num_threads) {
            const PhiloxArgs args{shape_of(shape), source_of(source), operand_of(out), nullptr, num_threads};
            py::gil_scoped_release release;
            philox_normal(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("source"), py::arg("out"), py::arg("num_threads"));
    m.def(
        "philox_uint32",
        [](const py::tuple& shape, const py::handle& source, const py::handle& out, int num_threads) {
            const PhiloxArgs args{shape_of(shape), source_of(source), {}, pointer<int64_t>(out), num_threads};
            py::gil_scoped_release release;
            philox_uint32(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("source"), py::arg("out"), py::arg("num_threads"));
}

}  // namespace diffkern
