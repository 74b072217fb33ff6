// x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, one pass: the two coefficients are gathered per sample, eps is read or
// computed in place. Reads x0 (and eps if given), writes x_t (and eps if asked for): 8 or 12 bytes an element in
// float32, bound by memory with eps given and by the noise's arithmetic without.
#include "cpu/q_sample.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// Elements [first, end) of a sample, with eps from `args.noise` or from `generated`.
template <class Real, class Access>
static void piece(const QSampleArgs& args, int64_t sample, int64_t first, int64_t end, const Real* generated) {
    const Vec<Real> signal = broadcast(static_cast<Real>(args.sqrt_alphas_cumprod[args.t[sample]]));
    const Vec<Real> sigma = broadcast(static_cast<Real>(args.sqrt_one_minus_alphas_cumprod[args.t[sample]]));
    const Access x0(args.x0, sample), given(args.noise, sample), x_t(args.x_t, sample),
        noise_out(args.noise_out, sample);
    const auto loop = [&](auto eps_at) {
        for_lanes(first, end, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            const Vec<Real> eps = eps_at(i, n);
            x_t.store(i, signal * x0.load(i, n) + sigma * eps, n);
            if (args.noise_out) noise_out.store(i, eps, n);
        });
    };
    if (generated)
        loop([&](int64_t i, int n) DIFFKERN_LAMBDA { return load_n(generated + (i - first), n); });
    else
        loop([&](int64_t i, int n) DIFFKERN_LAMBDA { return given.load(i, n); });
}

template <class Real, class Access>
static void run(const QSampleArgs& args) {
    const Chunks chunks(args.shape);
    for_each_chunk(args.shape, chunks, args.num_threads, [&](int64_t sample, int64_t first, int64_t end) {
        if (args.noise) return piece<Real, Access>(args, sample, first, end, nullptr);
        NoiseBuffer<Real> noise(args.shape, chunks.size);
        noise.fill(noise_stream(args.source, sample), first, end - first);
        piece<Real, Access>(args, sample, first, end, noise.values);
    });
}

void q_sample(const QSampleArgs& args) {
    if (args.x_t.dtype == DType::f64) return run<double, Plain<double>>(args);
    const bool plain = args.x_t.dtype == DType::f32 && args.x0.absent_or(DType::f32) &&
                       args.noise.absent_or(DType::f32) && args.noise_out.absent_or(DType::f32);
    plain ? run<float, Plain<float>>(args) : run<float, Cursor<float>>(args);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
