// r_n = phi std(c) / std(m) + 1 - phi with m = u + w (c - u), over all values of sample n. Reads u and c once from
// memory, 8 bytes an element in float32, in chunks: a chunk's mean first, then its squared deviations from it while it
// is in the first cache, all in double. Chunks are joined by Chan's formula in their order, so the result does not
// depend on threads, and a mean far from 0 costs no digits.
#include "cpu/guidance_rescale.h"

#include <vector>

#include "cpu/parallel.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// Loads as float64. What a partial vector lacks is 0.
template <class T>
DIFFKERN_INLINE f64v load_wide(const char* base, int64_t i, int n) {
    return __builtin_convertvector(load_n(reinterpret_cast<const T*>(base) + i, n), f64v);
}
template <>
DIFFKERN_INLINE f64v load_wide<double>(const char* base, int64_t i, int n) {
    return load_n(reinterpret_cast<const double*>(base) + i, n);
}

static double sum_lanes(f64v v) {
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
    return total;
}

// How many values, their mean, and the sum of squared deviations from it.
struct Moments {
    double count = 0, mean = 0, squares = 0;

    // Chan, Golub & LeVeque 1983.
    void join(const Moments& other) {
        const double total = count + other.count, difference = other.mean - mean;
        mean += difference * (other.count / total);
        squares += other.squares + difference * difference * (count * other.count / total);
        count = total;
    }
};

struct ChunkMoments {
    Moments cond, guided;
};

template <class T>
static ChunkMoments moments_of(const GuidanceRescaleArgs& args, int64_t sample, int64_t first, int64_t end) {
    const auto bytes = static_cast<int64_t>(sizeof(T));
    const char* uncond = args.uncond.data + sample * args.uncond.sample_stride * bytes;
    const char* cond = args.cond.data + sample * args.cond.sample_stride * bytes;
    const double w = args.guidance_scale[args.guidance_per_sample ? sample : 0];
    const auto count = static_cast<double>(end - first);
    f64v sum_c = {}, sum_m = {};
    for_lanes(first, end, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const f64v u = load_wide<T>(uncond, i, n), c = load_wide<T>(cond, i, n);
        sum_c += c;
        sum_m += u + w * (c - u);
    });
    const double mean_c = sum_lanes(sum_c) / count, mean_m = sum_lanes(sum_m) / count;
    f64v squares_c = {}, squares_m = {};
    for_lanes(first, end, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const f64v u = load_wide<T>(uncond, i, n), c = load_wide<T>(cond, i, n);
        f64v of_c = c - mean_c, of_m = (u + w * (c - u)) - mean_m;
        for (int lane = n; lane < kLanes; ++lane) of_c[lane] = of_m[lane] = 0;
        squares_c += of_c * of_c;
        squares_m += of_m * of_m;
    });
    return {{count, mean_c, sum_lanes(squares_c)}, {count, mean_m, sum_lanes(squares_m)}};
}

template <class T>
static void run(const GuidanceRescaleArgs& args) {
    SampleShape shape = args.shape;
    shape.channels_last = false;  // chunks of whole pixels are for noise alone
    const Chunks chunks(shape);
    std::vector<ChunkMoments> parts(static_cast<size_t>(shape.samples * chunks.per_sample));
    for_each_chunk(shape, chunks, args.num_threads, [&](int64_t sample, int64_t first, int64_t end) {
        parts[static_cast<size_t>(sample * chunks.per_sample + first / chunks.size)] =
            moments_of<T>(args, sample, first, end);
    });
    for (int64_t sample = 0; sample < shape.samples; ++sample) {
        ChunkMoments whole;
        for (int64_t chunk = 0; chunk < chunks.per_sample; ++chunk) {
            const ChunkMoments& part = parts[static_cast<size_t>(sample * chunks.per_sample + chunk)];
            whole.cond.join(part.cond);
            whole.guided.join(part.guided);
        }
        const double ratio = __builtin_sqrt(whole.cond.squares / (whole.cond.count - 1)) /
                             __builtin_sqrt(whole.guided.squares / (whole.guided.count - 1));
        args.rescale[sample] = args.phi * ratio + (1 - args.phi);
    }
}

void guidance_rescale(const GuidanceRescaleArgs& args) {
    switch (args.cond.dtype) {
        case DType::f64: return run<double>(args);
        case DType::bf16: return run<bf16>(args);
        case DType::f16: return run<f16>(args);
        default: return run<float>(args);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
