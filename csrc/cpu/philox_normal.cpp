// The noise source alone: philox_normal writes normals in any storage type and memory order. It reads nothing, writes
// each element once, and is bound by arithmetic (csrc/cpu/normal.h).
#include "cpu/philox_normal.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class Real>
static void run(const PhiloxArgs& args) {
    const Chunks chunks(args.shape);
    const int64_t total = args.shape.channels * args.shape.pixels;
    auto body = [&](int64_t task) {
        const int64_t sample = task / chunks.per_sample;
        const int64_t first = task % chunks.per_sample * chunks.size;
        const int64_t end = first + chunks.size < total ? first + chunks.size : total;
        NoiseBuffer<Real> noise(args.shape, chunks.size);
        noise.fill(noise_stream(args.noise, sample), first, end - first);
        const Cursor<Real> out(args.out, sample);
        for_lanes(first, end,
                  [&](int64_t i, int n) DIFFKERN_LAMBDA { out.store(i, load_n(noise.values + (i - first), n), n); });
    };
    parallel_for(args.shape.samples * chunks.per_sample, args.num_threads, body);
}

void philox_normal(const PhiloxArgs& args) {
    args.out.dtype == DType::f64 ? run<double>(args) : run<float>(args);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
