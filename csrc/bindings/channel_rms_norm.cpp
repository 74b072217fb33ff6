#include "cpu/channel_rms_norm.h"

#include "bindings/convert.h"

namespace diffkern {
namespace {

ChannelRmsNormArgs channel_rms_norm_args(const py::tuple& shape, int dtype, const py::handle& x,
                                         const py::handle& weight, const py::handle& scale, const py::handle& shift,
                                         double eps, bool silu, const py::handle& y, const py::handle& norm,
                                         int num_threads) {
    return {shape_of(shape),
            static_cast<DType>(dtype),
            pointer<const char>(x),
            parameter_of(weight),
            parameter_of(scale),
            parameter_of(shift),
            static_cast<float>(eps),
            silu,
            pointer<char>(y),
            pointer<float>(norm),
            num_threads};
}

}  // namespace

void bind_channel_rms_norm(py::module_& m) {
    m.def(
        "channel_rms_norm",
        [](const py::tuple& shape, int dtype, const py::handle& x, const py::handle& weight, const py::handle& scale,
           const py::handle& shift, double eps, bool silu, const py::handle& y, const py::handle& norm,
           int num_threads) {
            const ChannelRmsNormArgs args =
                channel_rms_norm_args(shape, dtype, x, weight, scale, shift, eps, silu, y, norm, num_threads);
            py::gil_scoped_release release;
            channel_rms_norm(args);
        },
        py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("scale"), py::arg("shift"),
        py::arg("eps"), py::arg("silu"), py::arg("y"), py::arg("norm"), py::arg("num_threads"));
    m.def(
        "channel_rms_norm_backward",
        [](const py::tuple& shape, int dtype, const py::handle& x, const py::handle& weight, const py::handle& scale,
           const py::handle& shift, double eps, bool silu, const py::handle& norm, const py::handle& dy,
           const py::handle& dx, const py::handle& dweight, const py::handle& dscale, const py::handle& dshift,
           int num_threads) {
            const ChannelRmsNormBackwardArgs args{
                channel_rms_norm_args(shape, dtype, x, weight, scale, shift, eps, silu, py::none(), norm, num_threads),
                pointer<const char>(dy),
                pointer<char>(dx),
                pointer<float>(dweight),
                pointer<float>(dscale),
                pointer<float>(dshift)};
            py::gil_scoped_release release;
            channel_rms_norm_backward(args);
        },
        py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("scale"), py::arg("shift"),
        py::arg("eps"), py::arg("silu"), py::arg("norm"), py::arg("dy"), py::arg("dx"), py::arg("dweight"),
        py::arg("dscale"), py::arg("dshift"), py::arg("num_threads"));
}

}  // namespace diffkern
