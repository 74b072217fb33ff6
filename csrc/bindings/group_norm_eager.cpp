// group_norm of plain CPU tensors in eager mode, from tensor to tensor in one call: what makes a call on a tiny tensor
// cheaper than eager PyTorch's two. Anything that is not plain (another layout, dtype, device or type, or an argument
// that is wrong) gives None, and diffkern/ops/group_norm/op.py takes the general road, which also has the errors. So do
// calls with skip, whose tensors are seldom tiny.
#include <initializer_list>
#include <memory>

#include "bindings/tensor.h"
#include "cpu/group_norm.h"
#include "cpu/huge_pages.h"

namespace diffkern {
namespace {

// x as the kernel wants it, or nothing.
std::optional<SampleShape> plain_shape(const TensorView& x) {
    if (x.rank < 2 || x.dtype == DType::f64) return {};
    const bool contiguous = x.contiguous();
    if (x.numel() == 0 || (!contiguous && !x.channels_last())) return {};
    int64_t pixels = 1;
    for (int i = 2; i < x.rank; ++i) pixels *= x.shape[i];
    return SampleShape{x.shape[0], x.shape[1], pixels, !contiguous};
}

bool fits_dtype(const TensorView& p, const TensorView& x) {
    return p.dtype == x.dtype || p.dtype == DType::f32;
}

// weight or bias (C,); false if it is not plain. None gives an absent parameter.
bool read_channel(const py::handle& tensor, const TensorView& x, Parameter& out) {
    if (tensor.is_none()) return true;
    const auto p = view_of(tensor);
    if (!p || p->rank != 1 || p->shape[0] != x.shape[1] || !fits_dtype(*p, x)) return false;
    out = {p->data, p->dtype, 0, p->strides[0]};
    return true;
}

// scale, shift or offset: (N, C), or of x's rank with ones.
bool read_sample(const py::handle& tensor, const TensorView& x, Parameter& out) {
    if (tensor.is_none()) return true;
    const auto p = view_of(tensor);
    if (!p || (p->rank != 2 && p->rank != x.rank) || !fits_dtype(*p, x)) return false;
    if (p->shape[0] != x.shape[0] || p->shape[1] != x.shape[1]) return false;
    for (int i = 2; i < p->rank; ++i)
        if (p->shape[i] != 1) return false;
    out = {p->data, p->dtype, p->strides[0], p->strides[1]};
    return true;
}

bool read_parameters(const TensorView& x, const py::handle& weight, const py::handle& bias, const py::handle& scale,
                     const py::handle& shift, const py::handle& offset, GroupNormArgs& args) {
    return read_channel(weight, x, args.weight) && read_channel(bias, x, args.bias) &&
           read_sample(scale, x, args.scale) && read_sample(shift, x, args.shift) &&
           read_sample(offset, x, args.offset);
}

bool any_requires_grad(std::initializer_list<py::handle> tensors) {
    for (const py::handle& tensor : tensors)
        if (!tensor.is_none() && requires_grad(tensor)) return true;
    return false;
}

int threads_for(const TensorView& x, int num_threads) {
    constexpr int64_t kParallelFrom = 32768;  // as PARALLEL_FROM in diffkern/ops/_native.py
    return x.numel() >= kParallelFrom ? num_threads : 1;
}

py::object forward(const py::handle& x, const py::handle& num_groups, const py::handle& weight, const py::handle& bias,
                   const py::handle& eps, const py::handle& scale, const py::handle& shift, const py::handle& offset,
                   bool silu, bool grad_enabled, int num_threads) {
    const auto view = view_of(x);
    if (!view || !PyLong_CheckExact(num_groups.ptr()) || !PyFloat_CheckExact(eps.ptr())) return py::none();
    const auto shape = plain_shape(*view);
    GroupNormArgs args{};
    if (!shape || !read_parameters(*view, weight, bias, scale, shift, offset, args)) return py::none();
    args.shape = *shape;
    args.x_channels = shape->channels;
    args.num_groups = PyLong_AsLong(num_groups.ptr());
    args.eps = PyFloat_AS_DOUBLE(eps.ptr());
    if (args.num_groups < 1 || shape->channels % args.num_groups != 0 || !(args.eps >= 0)) {
        PyErr_Clear();
        return py::none();
    }
    py::object y = empty_like(x), statistics;
    const auto y_view = view_of_new(y);
    if (!y_view) return py::none();
    if (grad_enabled && any_requires_grad({x, weight, bias, scale, shift, offset})) {
        statistics = empty_float32(py::make_tuple(2, shape->samples, args.num_groups));
        args.mean = reinterpret_cast<float*>(view_of_new(statistics)->data);
        args.rstd = args.mean + shape->samples * args.num_groups;
    }
    args.dtype = view->dtype;
    args.x = view->data;
    args.silu = silu;
    args.y = y_view->data;
    args.num_threads = threads_for(*view, num_threads);
    {
        py::gil_scoped_release release;
        advise_huge_pages(args.y, view->numel() * size_of(args.dtype));
        group_norm(args);
    }
    return statistics ? py::object(py::make_tuple(y, statistics)) : y;
}

// (2, N, G), as `forward` made it: what hooks on saved tensors give back may be anything.
bool holds_statistics(const TensorView& statistics, const GroupNormArgs& args) {
    return statistics.dtype == DType::f32 && statistics.rank == 3 && statistics.shape[0] == 2 &&
           statistics.shape[1] == args.shape.samples && statistics.shape[2] == args.num_groups &&
           statistics.contiguous();
}

// A parameter's gradient, float32 and contiguous, with its address; nothing there for an absent parameter.
struct Gradient {
    py::object tensor = py::none();
    float* data = nullptr;
};

bool make_gradient(const py::handle& parameter, bool wanted, Gradient& out) {
    if (parameter.is_none() || !wanted) return true;
    out.tensor = empty_like(parameter);
    const auto view = view_of_new(out.tensor);
    if (!view || view->dtype != DType::f32 || !view->contiguous()) return false;
    out.data = reinterpret_cast<float*>(view->data);
    return true;
}

py::object backward(const py::handle& dy, const py::handle& x, const py::handle& weight, const py::handle& bias,
                    const py::handle& scale, const py::handle& shift, const py::handle& offset,
                    const py::handle& statistics, const py::handle& num_groups, bool silu, const py::tuple& wanted,
                    int num_threads) {
    const auto view = view_of(x), dy_view = view_of(dy), statistics_view = view_of_new(statistics);
    if (!view || !dy_view || !statistics_view || dy_view->dtype != view->dtype) return py::none();
    if (!dy_view->same_shape(*view)) return py::none();
    const auto shape = plain_shape(*view);
    GroupNormArgs args{};
    if (!shape || !read_parameters(*view, weight, bias, scale, shift, offset, args)) return py::none();
    args.shape = *shape;
    args.x_channels = shape->channels;
    args.num_groups = num_groups.cast<int64_t>();
    if (!holds_statistics(*statistics_view, args)) return py::none();
    if (!(shape->channels_last ? dy_view->channels_last() : dy_view->contiguous())) return py::none();
    py::object dx = empty_like(x);
    const auto dx_view = view_of_new(dx);
    Gradient gradients[5];
    const py::handle parameters[5] = {weight, bias, scale, shift, offset};
    for (int i = 0; i < 5; ++i)
        if (!make_gradient(parameters[i], wanted[i].ptr() == Py_True, gradients[i])) return py::none();
    if (!dx_view) return py::none();

    args.dtype = view->dtype;
    args.x = view->data;
    args.silu = silu;
    args.mean = reinterpret_cast<float*>(statistics_view->data);
    args.rstd = args.mean + shape->samples * args.num_groups;
    args.num_threads = threads_for(*view, num_threads);
    {
        py::gil_scoped_release release;
        const int64_t rows = shape->samples * shape->channels;
        const std::unique_ptr<float[]> sums(new float[static_cast<unsigned long>(2 * rows)]);
        const GroupNormBackwardArgs backward{args,       dy_view->data,     dx_view->data,    nullptr,
                                             sums.get(), sums.get() + rows, gradients[4].data};
        advise_huge_pages(backward.dx, view->numel() * size_of(args.dtype));
        group_norm_backward(backward);
        group_norm_parameter_gradients(
            {backward, gradients[0].data, gradients[1].data, gradients[2].data, gradients[3].data});
    }
    return py::make_tuple(dx, gradients[0].tensor, gradients[1].tensor, gradients[2].tensor, gradients[3].tensor,
                          gradients[4].tensor);
}

}  // namespace

void bind_group_norm_eager(py::module_& m) {
    m.def("group_norm_eager", &forward, py::arg("x"), py::arg("num_groups"), py::arg("weight"), py::arg("bias"),
          py::arg("eps"), py::arg("scale"), py::arg("shift"), py::arg("offset"), py::arg("silu"),
          py::arg("grad_enabled"), py::arg("num_threads"),
          "y; (y, statistics) where a gradient is wanted; None where the call is not plain.");
    m.def("group_norm_backward_eager", &backward, py::arg("dy"), py::arg("x"), py::arg("weight"), py::arg("bias"),
          py::arg("scale"), py::arg("shift"), py::arg("offset"), py::arg("statistics"), py::arg("num_groups"),
          py::arg("silu"), py::arg("wanted"), py::arg("num_threads"),
          "(dx, dweight, dbias, dscale, dshift, doffset), or None.");
}

}  // namespace diffkern
