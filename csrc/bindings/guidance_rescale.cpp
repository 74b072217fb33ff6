#include "cpu/guidance_rescale.h"

#include "bindings/convert.h"

namespace diffkern {

void bind_guidance_rescale(py::module_& m) {
    m.def(
        "guidance_rescale",
        [](const py::tuple& shape, const py::handle& uncond, const py::handle& cond, const py::handle& guidance_scale,
           bool guidance_per_sample, double phi, const py::handle& rescale, int num_threads) {
            const GuidanceRescaleArgs args{shape_of(shape),          operand_of(uncond),
                                           operand_of(cond),         pointer<const double>(guidance_scale),
                                           guidance_per_sample,      phi,
                                           pointer<double>(rescale), num_threads};
            py::gil_scoped_release release;
            guidance_rescale(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("uncond"), py::arg("cond"), py::arg("guidance_scale"),
        py::arg("guidance_per_sample"), py::arg("phi"), py::arg("rescale"), py::arg("num_threads"));
}

}  // namespace diffkern
