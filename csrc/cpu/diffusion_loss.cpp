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

    // Adds the sum of squares over [first, end) of the sample; generated is eps of these elements, or null.
    void run(int64_t first, int64_t end, const float* generated, double* sum) const {
        *sum += generated ? run<true>(first, end, generated) : run<false>(first, end, nullptr);
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

template <LossTarget kTarget, bool kGrad, class Data>
static void run_parts(const DiffusionLossArgs& args, const Parts& parts) {
    const bool generates = kTarget != LossTarget::x0 && !args.noise;
    sum_parts<1>(args.shape, parts, generates ? &args.source : nullptr, args.num_threads, args.partial_sums,
                 [&](int64_t sample) { return Loss<kTarget, kGrad, Data>(args, sample); });
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
        const double sum = joined<1>(args.partial_sums, parts, sample, 0);
        const double weight = args.weight ? args.weight[sample] : 1.0;
        args.loss[sample] = static_cast<float>(weight * (sum / size));
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
