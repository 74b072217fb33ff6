// Compiled once per instruction set, like a kernel, and like one without anything from the standard library.
#include "tests/probe.h"

#include "cpu/normal.h"
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class From, class To>
static void copy(const CopyProbe& args) {
    const From* in = reinterpret_cast<const From*>(args.in);
    To* out = reinterpret_cast<To*>(args.out);
    for_lanes(0, args.count, [&](int64_t i, int n) DIFFKERN_LAMBDA { store_n(out + i, load_n(in + i, n), n); });
}

template <class From>
static void copy_from(const CopyProbe& args) {
    switch (args.to) {
        case DType::bf16: return copy<From, bf16>(args);
        case DType::f16: return copy<From, f16>(args);
        default: return copy<From, float>(args);
    }
}

template <class T, class Wide>
static void partial(const PartialProbe& args) {
    store(reinterpret_cast<Wide*>(args.lanes), load_partial(reinterpret_cast<const T*>(args.in), args.n));
}

template <class Fn>
static void map(const MapProbe& args, Fn fn) {
    for_lanes(0, args.count,
              [&](int64_t i, int n) DIFFKERN_LAMBDA { store_n(args.y + i, fn(load_n(args.x + i, n)), n); });
}

void probe_lanes(const LanesProbe& args) {
    *args.lanes = kLanes;
}

void probe_copy(const CopyProbe& args) {
    switch (args.from) {
        case DType::f64: return copy<double, double>(args);
        case DType::bf16: return copy_from<bf16>(args);
        case DType::f16: return copy_from<f16>(args);
        default: return copy_from<float>(args);
    }
}

void probe_partial(const PartialProbe& args) {
    switch (args.dtype) {
        case DType::f64: return partial<double, double>(args);
        case DType::bf16: return partial<bf16, float>(args);
        case DType::f16: return partial<f16, float>(args);
        default: return partial<float, float>(args);
    }
}

void probe_map(const MapProbe& args) {
    switch (args.function) {
        case Function::exp_clamped: return map(args, [](f32v x) DIFFKERN_LAMBDA { return exp_clamped(x); });
        case Function::silu: return map(args, [](f32v x) DIFFKERN_LAMBDA { return silu(x); });
        default: return map(args, [](f32v x) DIFFKERN_LAMBDA { return sqrt(x); });
    }
}

void probe_sum(const SumProbe& args) {
    *args.total = sum(load(args.x));
}

void probe_box_muller(const BoxMullerProbe& args) {
    for (int64_t i = 0; i < args.count; i += kLanes) {
        const auto n = static_cast<int>(args.count - i < kLanes ? args.count - i : kLanes);
        u32v radius_words = {}, angle_words = {};
        for (int lane = 0; lane < n; ++lane) {
            radius_words[lane] = args.radius[i + lane];
            angle_words[lane] = args.angle[i + lane];
        }
        f32v cosine, sine;
        cos_sin(angle_words, cosine, sine);
        const f32v r = radius(radius_words);
        store_n(args.first + i, r * cosine, n);
        store_n(args.second + i, r * sine, n);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
