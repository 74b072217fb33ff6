#include "bindings/convert.h"
#include "cpu/group_norm.h"

namespace diffkern {
namespace {

GroupNormArgs group_norm_args(const py::tuple& shape, int64_t num_groups, int dtype, const py::handle& x,
                              const py::handle& skip, int64_t x_channels, const py::handle& weight,
                              const py::handle& bias, const py::handle& scale, const py::handle& shift,
                              const py::handle& offset, double eps, bool silu, const py::handle& y,
                              const py::handle& mean, const py::handle& rstd, int num_threads) {
    return {shape_of(shape),
            num_groups,
            static_cast<DType>(dtype),
            pointer<const char>(x),
            pointer<const char>(skip),
            x_channels,
            parameter_of(weight),
            parameter_of(bias),
            parameter_of(scale),
            parameter_of(shift),
            parameter_of(offset),
            eps,
            silu,
            pointer<char>(y),
            pointer<float>(mean),
            pointer<float>(rstd),
            num_threads};
}

}  // namespace

void bind_group_norm(py::module_& m) {
    m.def(
        "group_norm",
        [](const py::tuple& shape, int64_t num_groups, int dtype, const py::handle& x, const py::handle& skip,
           int64_t x_channels, const py::handle& weight, const py::handle& bias, const py::handle& scale,
           const py::handle& shift, const py::handle& offset, double eps, bool silu, const py::handle& y,
           const py::handle& mean, const py::handle& rstd, int num_threads) {
            const GroupNormArgs args = group_norm_args(shape, num_groups, dtype, x, skip, x_channels, weight, bias,
                                                       scale, shift, offset, eps, silu, y, mean, rstd, num_threads);
            py::gil_scoped_release release;
            group_norm(args);
        },
        py::arg("shape"), py::arg("num_groups"), py::arg("dtype"), py::arg("x"), py::arg("skip"), py::arg("x_channels"),
        py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("offset"), py::arg("eps"),
        py::arg("silu"), py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("num_threads"));
    m.def(
        "group_norm_backward",
        [](const py::tuple& shape, int64_t num_groups, int dtype, const py::handle& x, const py::handle& skip,
           int64_t x_channels, const py::handle& weight, const py::handle& bias, const py::handle& scale,
           const py::handle& shift, const py::handle& offset, bool silu, const py::handle& mean, const py::handle& rstd,
           const py::handle& dy, const py::handle& dx, const py::handle& dskip, const py::handle& sums,
           const py::handle& dweight, const py::handle& dbias, const py::handle& dscale, const py::handle& dshift,
           const py::handle& doffset, int num_threads) {
            GroupNormBackwardArgs args{
                group_norm_args(shape, num_groups, dtype, x, skip, x_channels, weight, bias, scale, shift, offset, 0.0,
                                silu, py::none(), mean, rstd, num_threads),
                pointer<const char>(dy),
                pointer<char>(dx),
                pointer<char>(dskip),
                pointer<float>(sums),
                nullptr,
                pointer<float>(doffset)};
            args.sum_dz_xhat = args.sum_dz + args.forward.shape.samples * args.forward.shape.channels;
            const GroupNormParameterArgs grads{args, pointer<float>(dweight), pointer<float>(dbias),
                                               pointer<float>(dscale), pointer<float>(dshift)};
            py::gil_scoped_release release;
            group_norm_backward(args);
            group_norm_parameter_gradients(grads);
        },
        py::arg("shape"), py::arg("num_groups"), py::arg("dtype"), py::arg("x"), py::arg("skip"), py::arg("x_channels"),
        py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("offset"), py::arg("silu"),
        py::arg("mean"), py::arg("rstd"), py::arg("dy"), py::arg("dx"), py::arg("dskip"), py::arg("sums"),
        py::arg("dweight"), py::arg("dbias"), py::arg("dscale"), py::arg("dshift"), py::arg("doffset"),
        py::arg("num_threads"));
}

}  // namespace diffkern
