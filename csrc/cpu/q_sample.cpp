// x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, one pass: the two coefficients are gathered per sample, eps is read or
// computed in place. Reads x0 (and eps if given), writes x_t (and eps if asked for): 8 or 12 bytes an element in
// float32, bound by memory with eps given and by the noise's arithmetic without.
#include "cpu/q_sample.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class Real>
static void run(const QSampleArgs& args) {
    const Chunks chunks(args.shape);
    const int64_t total = args.shape.channels * args.shape.pixels;
    auto piece = [&](int64_t sample, int64_t first, int64_t end, const Real* generated) {
        const Vec<Real> signal = broadcast(static_cast<Real>(args.sqrt_alphas_cumprod[args.t[sample]]));
        const Vec<Real> sigma = broadcast(static_cast<Real>(args.sqrt_one_minus_alphas_cumprod[args.t[sample]]));
        const Cursor<Real> x0(args.x0, sample), given(args.noise, sample), x_t(args.x_t, sample),
            noise_out(args.noise_out, sample);
        for_lanes(first, end, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            const Vec<Real> eps = generated ? load_n(generated + (i - first), n) : given.load(i, n);
            x_t.store(i, signal * x0.load(i, n) + sigma * eps, n);
            if (args.noise_out) noise_out.store(i, eps, n);
        });
    };
    auto body = [&](int64_t task) {
        const int64_t sample = task / chunks.per_sample;
        const int64_t first = task % chunks.per_sample * chunks.size;
        const int64_t end = first + chunks.size < total ? first + chunks.size : total;
        if (args.noise) {
            piece(sample, first, end, nullptr);
        } else {
            NoiseBuffer<Real> noise(args.shape, chunks.size);
            noise.fill(noise_stream(args.source, sample), first, end - first);
            piece(sample, first, end, noise.values);
        }
    };
    parallel_for(args.shape.samples * chunks.per_sample, args.num_threads, body);
}

void q_sample(const QSampleArgs& args) {
    args.x_t.dtype == DType::f64 ? run<double>(args) : run<float>(args);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
