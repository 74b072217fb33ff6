#include "bindings/convert.h"
#include "common/check.h"
#include "cpu/q_sample.h"

namespace diffkern {

void bind_q_sample(py::module_& m) {
    m.def(
        "q_sample",
        [](const py::tuple& shape, const py::handle& x0, const py::handle& noise, const py::handle& source,
           const py::handle& t, const py::handle& sqrt_alphas_cumprod, const py::handle& sqrt_one_minus_alphas_cumprod,
           int64_t num_timesteps, const py::handle& x_t, const py::handle& noise_out, int num_threads) {
            const QSampleArgs args{shape_of(shape),
                                   operand_of(x0),
                                   operand_of(noise),
                                   source_of(source),
                                   pointer<const int64_t>(t),
                                   pointer<const double>(sqrt_alphas_cumprod),
                                   pointer<const double>(sqrt_one_minus_alphas_cumprod),
                                   operand_of(x_t),
                                   operand_of(noise_out),
                                   num_threads};
            check_indices("t", args.t, args.shape.samples, num_timesteps);
            py::gil_scoped_release release;
            q_sample(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("x0"), py::arg("noise"), py::arg("source"), py::arg("t"),
        py::arg("sqrt_alphas_cumprod"), py::arg("sqrt_one_minus_alphas_cumprod"), py::arg("num_timesteps"),
        py::arg("x_t"), py::arg("noise_out"), py::arg("num_threads"));
}

}  // namespace diffkern
