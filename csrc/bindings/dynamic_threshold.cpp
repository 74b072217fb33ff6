#include "cpu/dynamic_threshold.h"

#include "bindings/convert.h"
#include "common/check.h"

namespace diffkern {

void bind_dynamic_threshold(py::module_& m) {
    m.def("threshold_scratch", &threshold_scratch, py::arg("count"), "Values of scratch for each task.");
    m.def(
        "dynamic_threshold",
        [](const py::tuple& shape, const py::handle& x, const py::handle& uncond, const py::handle& cond,
           const py::handle& table, int64_t num_rows, int64_t num_columns, const py::handle& row, bool row_per_sample,
           const py::handle& guidance_scale, bool guidance_per_sample, const py::handle& guidance_rescale, double ratio,
           double largest, const py::handle& scratch, const py::handle& threshold, int num_tasks) {
            const DynamicThresholdArgs args{shape_of(shape),
                                            operand_of(x),
                                            operand_of(uncond),
                                            operand_of(cond),
                                            pointer<const double>(table),
                                            num_columns,
                                            pointer<const int64_t>(row),
                                            row_per_sample,
                                            pointer<const double>(guidance_scale),
                                            guidance_per_sample,
                                            pointer<const double>(guidance_rescale),
                                            ratio,
                                            largest,
                                            pointer<void>(scratch),
                                            pointer<double>(threshold),
                                            num_tasks};
            check_indices("row", args.row, row_per_sample ? args.shape.samples : 1, num_rows);
            py::gil_scoped_release release;
            dynamic_threshold(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("x"), py::arg("uncond"), py::arg("cond"), py::arg("table"),
        py::arg("num_rows"), py::arg("num_columns"), py::arg("row"), py::arg("row_per_sample"),
        py::arg("guidance_scale"), py::arg("guidance_per_sample"), py::arg("guidance_rescale"), py::arg("ratio"),
        py::arg("largest"), py::arg("scratch"), py::arg("threshold"), py::arg("num_tasks"));
}

}  // namespace diffkern
