// Python bindings of the CPU kernels: raw addresses, sizes and strides, no torch. Callers (diffkern/ops/<op>/native.py)
// have checked every shape and dtype; only the index values are checked here, where the data are.
//
//   shape    (samples, channels, pixels, channels_last)
//   operand  (address, dtype code, elements between samples), or None
//   source   (seed address, draw address, draw per sample, samples address, index per sample, stream), or None
//   param    (address, dtype code, elements between samples, elements between channels), or None
#include <pybind11/pybind11.h>

#include <cstdlib>

#include "common/check.h"
#include "cpu/group_norm.h"
#include "cpu/parallel.h"
#include "cpu/philox_normal.h"
#include "cpu/q_sample.h"
#include "cpu/solver_step.h"

namespace py = pybind11;
using namespace diffkern;

namespace {

template <class T>
T* pointer(const py::handle& address) {
    return address.is_none() ? nullptr : reinterpret_cast<T*>(address.cast<std::uintptr_t>());
}

DType dtype_of(const py::handle& code) {
    return static_cast<DType>(code.cast<int>());
}

SampleShape shape_of(const py::tuple& t) {
    return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<bool>()};
}

Operand operand_of(const py::handle& o) {
    if (o.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(o);
    return {pointer<char>(t[0]), dtype_of(t[1]), t[2].cast<int64_t>()};
}

Parameter parameter_of(const py::handle& o) {
    if (o.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(o);
    return {pointer<const char>(t[0]), dtype_of(t[1]), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

NoiseArgs source_of(const py::handle& o) {
    if (o.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(o);
    return {pointer<const int64_t>(t[0]),
            pointer<const int64_t>(t[1]),
            t[2].cast<bool>(),
            pointer<const int64_t>(t[3]),
            t[4].cast<bool>(),
            t[5].cast<int64_t>()};
}

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

GroupNormArgs group_norm_args(const py::tuple& shape, int64_t num_groups, int dtype, const py::handle& x,
                              const py::handle& weight, const py::handle& bias, const py::handle& scale,
                              const py::handle& shift, double eps, bool silu, const py::handle& y,
                              const py::handle& mean, const py::handle& rstd, int num_threads) {
    return {shape_of(shape),
            num_groups,
            static_cast<DType>(dtype),
            pointer<const char>(x),
            parameter_of(weight),
            parameter_of(bias),
            parameter_of(scale),
            parameter_of(shift),
            eps,
            silu,
            pointer<char>(y),
            pointer<float>(mean),
            pointer<float>(rstd),
            num_threads};
}

void bind_group_norm(py::module_& m) {
    m.def(
        "group_norm",
        [](const py::tuple& shape, int64_t num_groups, int dtype, const py::handle& x, const py::handle& weight,
           const py::handle& bias, const py::handle& scale, const py::handle& shift, double eps, bool silu,
           const py::handle& y, const py::handle& mean, const py::handle& rstd, int num_threads) {
            const GroupNormArgs args = group_norm_args(shape, num_groups, dtype, x, weight, bias, scale, shift, eps,
                                                       silu, y, mean, rstd, num_threads);
            py::gil_scoped_release release;
            group_norm(args);
        },
        py::arg("shape"), py::arg("num_groups"), py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("scale"), py::arg("shift"), py::arg("eps"), py::arg("silu"), py::arg("y"), py::arg("mean"),
        py::arg("rstd"), py::arg("num_threads"));
    m.def(
        "group_norm_backward",
        [](const py::tuple& shape, int64_t num_groups, int dtype, const py::handle& x, const py::handle& weight,
           const py::handle& bias, const py::handle& scale, const py::handle& shift, bool silu, const py::handle& mean,
           const py::handle& rstd, const py::handle& dy, const py::handle& dx, const py::handle& sums,
           const py::handle& dweight, const py::handle& dbias, const py::handle& dscale, const py::handle& dshift,
           int num_threads) {
            GroupNormBackwardArgs args{group_norm_args(shape, num_groups, dtype, x, weight, bias, scale, shift, 0.0,
                                                       silu, py::none(), mean, rstd, num_threads),
                                       pointer<const char>(dy), pointer<char>(dx), pointer<float>(sums), nullptr};
            args.sum_dz_xhat = args.sum_dz + args.forward.shape.samples * args.forward.shape.channels;
            const GroupNormParameterGradients grads{pointer<float>(dweight), pointer<float>(dbias),
                                                    pointer<float>(dscale), pointer<float>(dshift)};
            py::gil_scoped_release release;
            group_norm_backward(args);
            group_norm_parameter_gradients(args, grads);
        },
        py::arg("shape"), py::arg("num_groups"), py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("scale"), py::arg("shift"), py::arg("silu"), py::arg("mean"), py::arg("rstd"), py::arg("dy"),
        py::arg("dx"), py::arg("sums"), py::arg("dweight"), py::arg("dbias"), py::arg("dscale"), py::arg("dshift"),
        py::arg("num_threads"));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "diffkern's CPU kernels over raw pointers; see diffkern.ops for the public functions";
    choose_isa(std::getenv("DIFFKERN_CPU"));
    m.attr("isa") = isa_name(chosen_isa());
    m.def(
        "set_parallel", [](std::uintptr_t address) { set_parallel(reinterpret_cast<ParallelFn>(address)); },
        py::arg("address"), "The address of GOMP_parallel in the OpenMP runtime that torch uses; 0 runs serially.");
    m.def("has_parallel", &has_parallel);
    bind_philox(m);
    bind_q_sample(m);
    bind_solver_step(m);
    bind_group_norm(m);
}
