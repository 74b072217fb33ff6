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

// Sums of c and m, four side by side: an addition waits for the one before it, and short sums round less.
struct Sums {
    f64v c[4] = {}, m[4] = {};

    static double total(const f64v* v) {
        const f64v lanes = (v[0] + v[1]) + (v[2] + v[3]);
        double sums[kLanes];
        for (int i = 0; i < kLanes; ++i) sums[i] = lanes[i];
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
        return sums[0];
    }
};

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

// c and m of one sample.
template <class T>
class Halves {
 public:
    Halves(const GuidanceRescaleArgs& args, int64_t sample)
        : uncond_(args.uncond.data + sample * args.uncond.sample_stride * static_cast<int64_t>(sizeof(T))),
          cond_(args.cond.data + sample * args.cond.sample_stride * static_cast<int64_t>(sizeof(T))),
          w_(args.guidance_scale[args.guidance_per_sample ? sample : 0]) {
    }

    ChunkMoments moments(int64_t first, int64_t end) const {
        const f64v u = load_wide<T>(uncond_, first, 1), c = load_wide<T>(cond_, first, 1);
        const double count = static_cast<double>(end - first);
        // Means of differences from the first values: between equal values exactly 0.
        double mean_c = c[0], mean_m = guided(u, c)[0];
        Sums sums;
        for_each(first, end, mean_c, mean_m, [&](int part, f64v of_c, f64v of_m) DIFFKERN_LAMBDA {
            sums.c[part] += of_c;
            sums.m[part] += of_m;
        });
        mean_c += Sums::total(sums.c) / count;
        mean_m += Sums::total(sums.m) / count;
        Sums squares;
        for_each(first, end, mean_c, mean_m, [&](int part, f64v of_c, f64v of_m) DIFFKERN_LAMBDA {
            squares.c[part] += of_c * of_c;
            squares.m[part] += of_m * of_m;
        });
        return {{count, mean_c, Sums::total(squares.c)}, {count, mean_m, Sums::total(squares.m)}};
    }

 private:
    DIFFKERN_INLINE f64v guided(f64v u, f64v c) const {
        return u + w_ * (c - u);
    }

    // Calls fn(part, c - from_c, m - from_m); what a last vector lacks is 0.
    template <class Fn>
    DIFFKERN_INLINE void for_each(int64_t first, int64_t end, double from_c, double from_m, Fn fn) const {
        const auto differences = [&](int64_t i, int n, int part) DIFFKERN_LAMBDA {
            const f64v u = load_wide<T>(uncond_, i, n), c = load_wide<T>(cond_, i, n);
            f64v of_c = c - from_c, of_m = guided(u, c) - from_m;
            for (int lane = n; lane < kLanes; ++lane) of_c[lane] = of_m[lane] = 0;
            fn(part, of_c, of_m);
        };
        int64_t i = first;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
            for (int part = 0; part < 4; ++part) differences(i + part * kLanes, kLanes, part);
        for_lanes(i, end, [&](int64_t j, int n) DIFFKERN_LAMBDA { differences(j, n, 0); });
    }

    const char *uncond_, *cond_;
    double w_;
};

template <class T>
static void run(const GuidanceRescaleArgs& args) {
    SampleShape shape = args.shape;
    shape.channels_last = false;  // chunks of whole pixels are for noise alone
    const Chunks chunks(shape);
    std::vector<ChunkMoments> parts(static_cast<size_t>(shape.samples * chunks.per_sample));
    for_each_chunk(shape, chunks, args.num_threads, [&](int64_t sample, int64_t first, int64_t end) {
        parts[static_cast<size_t>(sample * chunks.per_sample + first / chunks.size)] =
            Halves<T>(args, sample).moments(first, end);
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
