#include "cpu/diffusion_loss.h"

#include "bindings/convert.h"
#include "common/check.h"

namespace diffkern {

//   scale  (address, one per sample), or None
void bind_diffusion_loss(py::module_& m) {
    m.attr("sample_parts") = kSampleParts;
    m.def(
        "diffusion_loss",
        [](const py::tuple& shape, int target, const py::handle& model_output, const py::handle& x0,
           const py::handle& noise, const py::handle& source, const py::handle& t,
           const py::handle& sqrt_alphas_cumprod, const py::handle& sqrt_one_minus_alphas_cumprod,
           int64_t num_timesteps, const py::handle& weight, const py::handle& scale, const py::handle& partial_sums,
           const py::handle& loss, const py::handle& grad, int num_threads) {
            DiffusionLossArgs args{shape_of(shape),
                                   static_cast<LossTarget>(target),
                                   operand_of(model_output),
                                   operand_of(x0),
                                   operand_of(noise),
                                   source_of(source),
                                   pointer<const int64_t>(t),
                                   pointer<const double>(sqrt_alphas_cumprod),
                                   pointer<const double>(sqrt_one_minus_alphas_cumprod),
                                   pointer<const double>(weight),
                                   nullptr,
                                   false,
                                   pointer<double>(partial_sums),
                                   pointer<float>(loss),
                                   operand_of(grad),
                                   num_threads};
            if (!scale.is_none()) {
                const auto pair = py::reinterpret_borrow<py::tuple>(scale);
                args.scale = pointer<const double>(pair[0]);
                args.scale_per_sample = pair[1].cast<bool>();
            }
            check_indices("t", args.t, args.shape.samples, num_timesteps);
            py::gil_scoped_release release;
            diffusion_loss(args);
        },
        py::kw_only(), py::arg("shape"), py::arg("target"), py::arg("model_output"), py::arg("x0"), py::arg("noise"),
        py::arg("source"), py::arg("t"), py::arg("sqrt_alphas_cumprod"), py::arg("sqrt_one_minus_alphas_cumprod"),
        py::arg("num_timesteps"), py::arg("weight"), py::arg("scale"), py::arg("partial_sums"), py::arg("loss"),
        py::arg("grad"), py::arg("num_threads"));
}

}  // namespace diffkern
