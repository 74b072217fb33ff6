#include "bindings/convert.h"
#include "common/check.h"
#include "cpu/solver_step.h"

namespace diffkern {

void bind_solver_step(py::module_& m) {
    m.def(
        "solver_step",
        [](const py::tuple& shape, const py::handle& x, const py::handle& uncond, const py::handle& cond,
           const py::handle& var, const py::handle& extra, const py::handle& noise, const py::handle& source,
           const py::handle& table, int64_t num_rows, int64_t num_columns, const py::handle& writes,
           const py::handle& row, bool row_per_sample, const py::handle& guidance_scale, bool guidance_per_sample,
           const py::handle& guidance_rescale, const py::handle& threshold, const py::handle& clip, int variance,
           const py::sequence& slots, const py::handle& out, const py::handle& x_in, int num_threads) {
            SolverStepArgs args{};
            args.shape = shape_of(shape);
            args.x = operand_of(x);
            args.uncond = operand_of(uncond);
            args.cond = operand_of(cond);
            args.var = operand_of(var);
            args.extra = operand_of(extra);
            args.noise = operand_of(noise);
            args.source = source_of(source);
            args.table = pointer<const double>(table);
            args.num_columns = num_columns;
            args.writes = pointer<const int64_t>(writes);
            args.row = pointer<const int64_t>(row);
            args.row_per_sample = row_per_sample;
            args.guidance_scale = pointer<const double>(guidance_scale);
            args.guidance_per_sample = guidance_per_sample;
            args.guidance_rescale = pointer<const double>(guidance_rescale);
            args.threshold = pointer<const double>(threshold);
            args.clip = !clip.is_none();
            if (args.clip) {
                const auto bounds = py::reinterpret_borrow<py::sequence>(clip);
                args.clip_low = bounds[0].cast<double>();
                args.clip_high = bounds[1].cast<double>();
            }
            args.variance = static_cast<Variance>(variance);
            args.num_slots = static_cast<int>(slots.size());
            if (args.num_slots > kMaxSlots) throw std::invalid_argument("slots: more than the kernel holds");
            for (int k = 0; k < args.num_slots; ++k) {
                args.slots[k] = operand_of(slots[k]);
            }
            args.out = operand_of(out);
            args.x_in = operand_of(x_in);
            args.num_threads = num_threads;
            check_indices("row", args.row, row_per_sample ? args.shape.samples : 1, num_rows);
            py::gil_scoped_release release;
            solver_step(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("x"), py::arg("uncond"), py::arg("cond"), py::arg("var"),
        py::arg("extra"), py::arg("noise"), py::arg("source"), py::arg("table"), py::arg("num_rows"),
        py::arg("num_columns"), py::arg("writes"), py::arg("row"), py::arg("row_per_sample"), py::arg("guidance_scale"),
        py::arg("guidance_per_sample"), py::arg("guidance_rescale"), py::arg("threshold"), py::arg("clip"),
        py::arg("variance"), py::arg("slots"), py::arg("out"), py::arg("x_in"), py::arg("num_threads"));
    m.attr("max_slots") = kMaxSlots;
}

}  // namespace diffkern
