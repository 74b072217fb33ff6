// loss_n = w_n mean((m - target)^2) and, in the same pass, its gradient scale_n w_n (2/D) (m - target) in m; the target
// is eps, x0 or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0, made in registers. Reads m and what the target is made of
// (eps may be computed in place), writes the gradient: 12 bytes an element in float32 with eps given, 8 with eps
// computed, and 4 less for the loss alone. Bound by memory with eps given, by the noise's arithmetic without.
//
// Squares are summed in float32 lanes over a chunk, chunks in double in their order: into a part by the thread that has
// it, and the parts of a sample by the caller's thread at the end.
#include "cpu/diffusion_loss.h"

#include <initializer_list>

namespace diffkern {
namespace DIFFKERN_ISA {

template <LossTarget kTarget, bool kGrad, class Data>
class Loss {
 public:
    Loss(const DiffusionLossArgs& args, int64_t sample)
        : model_output_(args.model_output, sample),
          x0_(args.x0, sample),
          noise_(args.noise, sample),
          grad_(args.grad, sample),
          signal_(broadcast(static_cast<float>(args.sqrt_alphas_cumprod[args.t[sample]]))),
          sigma_(broadcast(static_cast<float>(args.sqrt_one_minus_alphas_cumprod[args.t[sample]]))),
          slope_{} {
        if (!kGrad) return;
        const double size = static_cast<double>(args.shape.channels * args.shape.pixels);
        const double weight = args.weight ? args.weight[sample] : 1.0;
        const double scale = args.scale[args.scale_per_sample ? sample : 0];
        slope_ = broadcast(static_cast<float>(scale * weight * 2.0 / size));
    }

    // The sum of squares over [first, end) of the sample; generated is eps of these elements, or null.
    double run(int64_t first, int64_t end, const float* generated) const {
        return generated ? run<true>(first, end, generated) : run<false>(first, end, nullptr);
    }

 private:
    // Four sums side by side, since an addition waits for the one before it.
    template <bool kGenerated>
    double run(int64_t first, int64_t end, const float* generated) const {
        f32v sums[4] = {};
        auto add = [&](int64_t i, int n, f32v& squares) DIFFKERN_LAMBDA {
            // In a partial vector what is missing is 0 on both sides: it adds nothing.
            f32v residual = model_output_.load(i, n);
            if (kTarget == LossTarget::x0) {
                residual = residual - x0_.load(i, n);
            } else {
                const f32v eps = kGenerated ? load_n(generated + (i - first), n) : noise_.load(i, n);
                if (kTarget == LossTarget::eps) {
                    residual = residual - eps;
                } else {
                    // The target first: subtracted one by one, both terms would be rounded at the size of a large m.
                    // Which product is fused is said, so that the loss has the same bits with and without the gradient.
                    residual = residual - multiply_subtract(signal_, eps, sigma_ * x0_.load(i, n));
                }
            }
            if (kGrad) grad_.store(i, slope_ * residual, n);
            squares += residual * residual;
        };
        int64_t i = first;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
            for (int u = 0; u < 4; ++u) add(i + u * kLanes, kLanes, sums[u]);
        for_lanes(i, end, [&](int64_t j, int n) DIFFKERN_LAMBDA { add(j, n, sums[0]); });
        return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    Data model_output_, x0_, noise_, grad_;
    f32v signal_, sigma_, slope_;
};

// How a sample's chunks are shared out: a part is a few chunks, a task a few parts.
struct Parts {
    Chunks chunks;
    int64_t chunks_per_part, per_sample;

    explicit Parts(const SampleShape& shape) : chunks(shape) {
        chunks_per_part = (chunks.per_sample + kLossParts - 1) / kLossParts;
        per_sample = chunks.per_sample ? (chunks.per_sample + chunks_per_part - 1) / chunks_per_part : 0;
    }
};

constexpr int64_t kTasksPerThread = 16;

template <LossTarget kTarget, bool kGrad, class Data>
static void run_parts(const DiffusionLossArgs& args, const Parts& parts) {
    const int64_t total = args.shape.channels * args.shape.pixels;
    const int64_t count = args.shape.samples * parts.per_sample;
    const int64_t per_task = count / (kTasksPerThread * args.num_threads) + 1;
    const bool generates = kTarget != LossTarget::x0 && !args.noise;
    auto part_sum = [&](int64_t part, NoiseBuffer<float>& noise) {
        const int64_t sample = part / parts.per_sample;
        const Loss<kTarget, kGrad, Data> loss(args, sample);
        const int64_t begin = part % parts.per_sample * parts.chunks_per_part * parts.chunks.size;
        double sum = 0;
        for (int64_t chunk = 0; chunk < parts.chunks_per_part; ++chunk) {
            const int64_t first = begin + chunk * parts.chunks.size;
            const int64_t end = first + parts.chunks.size < total ? first + parts.chunks.size : total;
            if (first >= end) break;
            if (generates) noise.fill(noise_stream(args.source, sample), first, end - first);
            sum += loss.run(first, end, generates ? noise.values : nullptr);
        }
        return sum;
    };
    auto body = [&](int64_t task) {
        NoiseBuffer<float> noise(args.shape, parts.chunks.size);
        const int64_t end = (task + 1) * per_task < count ? (task + 1) * per_task : count;
        for (int64_t part = task * per_task; part < end; ++part) args.partial_sums[part] = part_sum(part, noise);
    };
    parallel_for((count + per_task - 1) / per_task, args.num_threads, body);
}

template <LossTarget kTarget>
static void run_target(const DiffusionLossArgs& args, const Parts& parts) {
    bool all_float = true;
    for (const Operand& operand : {args.model_output, args.x0, args.noise, args.grad})
        all_float = all_float && operand.absent_or(DType::f32);
    if (args.grad)
        all_float ? run_parts<kTarget, true, Plain<float>>(args, parts)
                  : run_parts<kTarget, true, Cursor<float>>(args, parts);
    else
        all_float ? run_parts<kTarget, false, Plain<float>>(args, parts)
                  : run_parts<kTarget, false, Cursor<float>>(args, parts);
}

void diffusion_loss(const DiffusionLossArgs& args) {
    const Parts parts(args.shape);
    switch (args.target) {
        case LossTarget::eps: run_target<LossTarget::eps>(args, parts); break;
        case LossTarget::x0: run_target<LossTarget::x0>(args, parts); break;
        case LossTarget::v: run_target<LossTarget::v>(args, parts); break;
    }
    const double size = static_cast<double>(args.shape.channels * args.shape.pixels);
    for (int64_t sample = 0; sample < args.shape.samples; ++sample) {
        double sum = 0;
        for (int64_t part = 0; part < parts.per_sample; ++part) {
            sum += args.partial_sums[sample * parts.per_sample + part];
        }
        const double weight = args.weight ? args.weight[sample] : 1.0;
        args.loss[sample] = static_cast<float>(weight * (sum / size));
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
