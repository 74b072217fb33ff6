// The noise source alone: philox_normal writes normals in any storage type and memory order. It reads nothing, writes
// each element once, and is bound by arithmetic (csrc/cpu/normal.h).
#include "cpu/philox_normal.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class Real>
static void run(const PhiloxArgs& args) {
    const Chunks chunks(args.shape);
    for_each_chunk(args.shape, chunks, args.num_threads, [&](int64_t sample, int64_t first, int64_t end) {
        NoiseBuffer<Real> noise(args.shape, chunks.size);
        noise.fill(noise_stream(args.noise, sample), first, end - first);
        const Cursor<Real> out(args.out, sample);
        for_lanes(first, end,
                  [&](int64_t i, int n) DIFFKERN_LAMBDA { out.store(i, load_n(noise.values + (i - first), n), n); });
    });
}

void philox_normal(const PhiloxArgs& args) {
    args.out.dtype == DType::f64 ? run<double>(args) : run<float>(args);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
