#include "cpu/vb_terms.h"

#include "bindings/convert.h"
#include "common/check.h"

namespace diffkern {

//   clip   (low, high), or None
//   scale  (address, one row per sample), or None
void bind_vb_terms(py::module_& m) {
    m.def(
        "vb_terms",
        [](const py::tuple& shape, const py::handle& mean, const py::handle& variance, const py::handle& x0,
           const py::handle& y, const py::handle& source, bool reads_y, bool x0_in_target, bool mean_of_x0,
           bool stops_mean, const py::handle& t, const py::handle& coefficients, int64_t num_timesteps,
           int64_t levels, bool exact, const py::handle& clip, const py::handle& scale,
           const py::handle& partial_sums, const py::handle& terms, const py::handle& grad_mean,
           const py::handle& grad_variance, int num_threads) {
            VbTermsArgs args{};
            args.shape = shape_of(shape);
            args.mean = operand_of(mean);
            args.variance = operand_of(variance);
            args.x0 = operand_of(x0);
            args.y = operand_of(y);
            args.source = source_of(source);
            args.reads_y = reads_y;
            args.x0_in_target = x0_in_target;
            args.mean_of_x0 = mean_of_x0;
            args.stops_mean = stops_mean;
            args.t = pointer<const int64_t>(t);
            args.coefficients = pointer<const double>(coefficients);
            args.levels = levels;
            args.exact = exact;
            args.clip = !clip.is_none();
            if (args.clip) {
                const auto pair = py::reinterpret_borrow<py::sequence>(clip);
                args.clip_low = pair[0].cast<double>();
                args.clip_high = pair[1].cast<double>();
            }
            if (!scale.is_none()) {
                const auto pair = py::reinterpret_borrow<py::tuple>(scale);
                args.scale = pointer<const double>(pair[0]);
                args.scale_per_sample = pair[1].cast<bool>();
            }
            args.partial_sums = pointer<double>(partial_sums);
            args.terms = pointer<float>(terms);
            args.grad_mean = operand_of(grad_mean);
            args.grad_variance = operand_of(grad_variance);
            args.num_threads = num_threads;
            check_indices("t", args.t, args.shape.samples, num_timesteps);
            py::gil_scoped_release release;
            vb_terms(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("mean"), py::arg("variance"), py::arg("x0"), py::arg("y"),
        py::arg("source"), py::arg("reads_y"), py::arg("x0_in_target"), py::arg("mean_of_x0"), py::arg("stops_mean"),
        py::arg("t"), py::arg("coefficients"), py::arg("num_timesteps"), py::arg("levels"), py::arg("exact"),
        py::arg("clip"), py::arg("scale"), py::arg("partial_sums"), py::arg("terms"), py::arg("grad_mean"),
        py::arg("grad_variance"), py::arg("num_threads"));
}

}  // namespace diffkern
