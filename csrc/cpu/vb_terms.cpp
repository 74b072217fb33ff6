// Per sample: mse = mean((m - target)^2), the term of the variational bound at its t in bits/dim, and the mean square
// of x0 - x0^ for the (clipped) x0 predicted; with the gradient of scale * terms in the same pass.
//
// Everything follows from the residual r = m - (of_y y + of_x0 x0), y = eps or x_t: x0 - x0^ = x0_scale r, the means of
// posterior and model are coef1 times as far apart, and with D = ln sigma^2 - ln beta~
//
//     t > 0:  KL = (D + e^-D - 1 + e^-D (mu~ - mu)^2 / beta~) / 2        t = 0:  the discretised Gaussian at x0
//
// Reads m (mean and variance channels), y, or computes it in place, and x0 where the target, the clip or the decoder
// need it; writes the gradient. One exponential an element where the variance is learned, none where it is fixed:
// bound by memory, or by the noise's arithmetic. Only samples at t = 0 pay for the decoder.
#include "cpu/vb_terms.h"

#include <initializer_list>

#include "cpu/discretised_gaussian.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr double kLn2 = 0.6931471805599453;

// D + e^-D - 1
static double exp_remainder(double delta) {
    return delta + __builtin_expm1(-delta);
}

// What is the same for all elements of a sample, in double.
struct Sample {
    bool first;
    double x0_scale, difference, precision, bias;

    Sample(const VbTermsArgs& args, int64_t n) : first(args.t[n] == 0) {
        const double* c = args.coefficients + args.t[n] * kVbColumns;
        x0_scale = c[kX0Scale];
        // What the base of the bound's difference, x0 - x0^ where that is clipped and r elsewhere, is multiplied with.
        difference = args.clip && args.mean_of_x0 ? c[kCoef1] : c[kCoef1] * c[kX0Scale];
        precision = __builtin_exp(-c[kLogVar]);
        bias = c[kDeltaBias];
    }
};

template <bool kGrad, bool kLearned, class Data>
class VbTerms {
 public:
    VbTerms(const VbTermsArgs& args, int64_t n)
        : args_(args),
          mean_(args.mean, n),
          variance_(args.variance, n),
          x0_(args.x0, n),
          y_(args.y, n),
          grad_mean_(args.grad_mean, n),
          grad_variance_(args.grad_variance, n),
          grey_(args.levels),
          sample_(args, n) {
        const double* c = args.coefficients + args.t[n] * kVbColumns;
        auto vector = [](double v) { return broadcast(static_cast<float>(v)); };
        of_y_ = vector(c[kOfY]);
        of_x0_ = vector(c[kOfX0]);
        x0_scale_ = vector(c[kX0Scale]);
        bias_ = vector(c[kDeltaBias]);
        slope_ = vector(c[kDeltaSlope]);
        slope_rest_ = vector(c[kDeltaSlope] - static_cast<double>(static_cast<float>(c[kDeltaSlope])));
        difference_ = vector(sample_.difference);
        squares_ = vector(sample_.precision * sample_.difference * sample_.difference);
        mean_of_x0_ = i32v{} - (args.mean_of_x0 ? 1 : 0);
        low_ = vector(args.clip_low);
        high_ = vector(args.clip_high);
        fixed_precision_ = vector(__builtin_exp(-sample_.bias));
        fixed_log_var_ = vector(c[kLogVar] + sample_.bias);
        if (!kGrad) return;
        const double size = static_cast<double>(args.shape.channels * args.shape.pixels);
        const double* scale = args.scale + (args.scale_per_sample ? n * kVbTerms : 0);
        const double of_vb = scale[1] / (size * kLn2);
        of_mse_ = scale[0] != 0;
        of_x0_mse_ = scale[2] != 0;
        of_bound_ = scale[1] != 0 && !args.stops_mean;
        const double of_base = args.clip && args.mean_of_x0 ? c[kX0Scale] : 1.0;  // of the base by m
        of_residual_ = vector(2.0 * scale[0] / size);
        of_x0_error_ = vector(2.0 * scale[2] / size * c[kX0Scale]);
        of_variance_ = vector(of_vb * c[kDeltaSlope]);
        const double of_mean = of_vb * of_base * sample_.difference;
        of_mean_ = vector(sample_.first ? of_mean : of_mean * sample_.precision * sample_.difference);
    }

    // Adds to the sums of r^2, of the bound's elements twice and, with a clip, of (x0 - x0^)^2.
    void run(int64_t first, int64_t end, const float* generated, double* sums) const {
        if (!sample_.first)
            generated ? run<false, true>(first, end, generated, sums) : run<false, false>(first, end, nullptr, sums);
        else
            generated ? run<true, true>(first, end, generated, sums) : run<true, false>(first, end, nullptr, sums);
    }

 private:
    static constexpr int64_t kBlock = 128 * kLanes;

    struct Sums {
        f32v square = {}, bound = {}, x0_square = {};
    };

    template <bool kFirst, bool kGenerated>
    void run(int64_t first, int64_t end, const float* generated, double* out) const {
        // Two of each side by side, since an addition waits for the one before it; to double before they lose digits.
        for (int64_t begin = first; begin < end; begin += kBlock)
            block<kFirst, kGenerated>(begin, begin + kBlock < end ? begin + kBlock : end,
                                      kGenerated ? generated + (begin - first) : nullptr, out);
    }

    template <bool kFirst, bool kGenerated>
    DIFFKERN_INLINE void block(int64_t first, int64_t end, const float* generated, double* out) const {
        Sums sums[2];
        auto add = [&](int64_t i, int n, Sums& to)
                       DIFFKERN_LAMBDA { element<kFirst>(i, n, kGenerated ? generated + (i - first) : nullptr, to); };
        int64_t i = first;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes)
            for (int u = 0; u < 2; ++u) add(i + u * kLanes, kLanes, sums[u]);
        for_lanes(i, end, [&](int64_t j, int n) DIFFKERN_LAMBDA { add(j, n, sums[0]); });
        out[0] += sum(sums[0].square + sums[1].square);
        out[1] += sum(sums[0].bound + sums[1].bound);
        if (args_.clip) out[2] += sum(sums[0].x0_square + sums[1].x0_square);
    }

    template <bool kFirst>
    DIFFKERN_INLINE void element(int64_t i, int n, const float* generated, Sums& sums) const {
        const f32v zero = {};
        const bool reads_x0 = kFirst || args_.x0_in_target || args_.clip;
        const f32v x0 = reads_x0 ? x0_.load(i, n) : zero;
        // Which product is fused is said, so that the terms have the same bits with and without the gradient.
        f32v target = args_.x0_in_target ? multiply_add(of_x0_, x0, zero) : zero;
        if (args_.reads_y) target = multiply_add(of_y_, generated ? load_n(generated, n) : y_.load(i, n), target);
        const f32v residual = mean_.load(i, n) - target;
        f32v base = residual, x0_error = x0_scale_ * residual;
        i32v outside = {};
        if (args_.clip) {
            const f32v predicted = multiply_add(-x0_scale_, residual, x0);
            // Written so that a NaN passes through both comparisons.
            outside = (predicted < low_) | (predicted > high_);
            f32v clipped = predicted < low_ ? low_ : predicted;
            clipped = clipped > high_ ? high_ : clipped;
            x0_error = x0 - clipped;
            if (args_.mean_of_x0) base = x0_error;
        }
        const f32v variance = kLearned ? variance_.load(i, n) : zero;
        const f32v delta = kLearned ? multiply_add(slope_, variance, bias_) : bias_;
        f32v bound, of_mean, of_delta;
        if (kFirst) {
            const f32v log_var = kLearned ? multiply_add(slope_, variance, fixed_log_var_) : fixed_log_var_;
            const f32v difference = difference_ * base;
            const Decoded decoded = args_.exact ? decode_exact(difference, log_var, x0, grey_)
                                                : decode_tanh(difference, log_var, x0, grey_);
            bound = 2.0f * decoded.value;
            of_mean = of_mean_ * decoded.of_difference;
            of_delta = decoded.of_log_var;
        } else {
            f32v e = fixed_precision_;
            if (kLearned) {
                // Of slope v alone and not of delta, and with what that product lost in rounding: an argument of 10 in
                // float32 is off by 1e-6, and so would be the result. NaN stays.
                const f32v v = slope_ * variance;
                const f32v lost = multiply_add(slope_rest_, variance, multiply_subtract(slope_, variance, v));
                e = fixed_precision_ * exp_of_minus(v);
                e = v == v ? (lost == lost ? e - e * lost : e) : v;
            }
            const f32v squared = squares_ * base * base;
            bound = multiply_add(e, squared, zero);
            of_mean = of_mean_ * (e * base);
            if (kLearned) {
                f32v derivative;
                const f32v remainder = exp_remainder(delta, e, derivative);
                bound = multiply_add(e, squared, remainder);
                of_delta = 0.5f * (derivative - e * squared);
            }
        }
        if (kGrad) {
            // What has no share in the gradient may be infinite.
            f32v grad = of_mse_ ? of_residual_ * residual : zero;
            if (of_x0_mse_) grad += outside ? zero : of_x0_error_ * x0_error;
            if (of_bound_) grad += outside & mean_of_x0_ ? zero : of_mean;
            grad_mean_.store(i, grad, n);
            if (kLearned) grad_variance_.store(i, of_variance_ * of_delta, n);
        }
        f32v square = residual * residual, x0_square = x0_error * x0_error;
        if (n < kLanes) {
            // What is missing in a partial vector is 0 on both sides, but no bound, and no x0 within the clip.
            bound = only(bound, n);
            x0_square = only(x0_square, n);
        }
        sums.square += square;
        sums.bound += bound;
        sums.x0_square += x0_square;
    }

    static f32v only(f32v v, int n) {
        for (int i = n; i < kLanes; ++i) v[i] = 0;
        return v;
    }

    const VbTermsArgs& args_;
    Data mean_, variance_, x0_, y_, grad_mean_, grad_variance_;
    GreyLevels grey_;
    Sample sample_;
    f32v of_y_, of_x0_, x0_scale_, bias_, slope_, slope_rest_, difference_, squares_, low_, high_;
    f32v fixed_precision_, fixed_log_var_;  // e^-D and ln sigma^2 where v = 0
    i32v mean_of_x0_;
    bool of_mse_ = false, of_x0_mse_ = false, of_bound_ = false;  // whether the term has a share in the mean's gradient
    f32v of_residual_ = {}, of_x0_error_ = {}, of_mean_ = {}, of_variance_ = {};
};

template <bool kGrad, bool kLearned, class Data>
static void run_parts(const VbTermsArgs& args, const Parts& parts) {
    const bool generates = args.reads_y && !args.y;
    sum_parts<kVbTerms>(args.shape, parts, generates ? &args.source : nullptr, args.num_threads, args.partial_sums,
                        [&](int64_t sample) { return VbTerms<kGrad, kLearned, Data>(args, sample); });
}

template <bool kGrad, bool kLearned>
static void run_typed(const VbTermsArgs& args, const Parts& parts) {
    bool all_float = true;
    for (const Operand& operand : {args.mean, args.variance, args.x0, args.y, args.grad_mean, args.grad_variance})
        all_float = all_float && operand.absent_or(DType::f32);
    all_float ? run_parts<kGrad, kLearned, Plain<float>>(args, parts)
              : run_parts<kGrad, kLearned, Cursor<float>>(args, parts);
}

void vb_terms(const VbTermsArgs& args) {
    const Parts parts(args.shape);
    if (args.grad_mean)
        args.variance ? run_typed<true, true>(args, parts) : run_typed<true, false>(args, parts);
    else
        args.variance ? run_typed<false, true>(args, parts) : run_typed<false, false>(args, parts);
    const double size = static_cast<double>(args.shape.channels * args.shape.pixels);
    for (int64_t n = 0; n < args.shape.samples; ++n) {
        const Sample sample(args, n);
        const double mse = joined<kVbTerms>(args.partial_sums, parts, n, 0) / size;
        double bound = joined<kVbTerms>(args.partial_sums, parts, n, 1) / size;
        if (!args.variance && !sample.first) bound += exp_remainder(sample.bias);
        const double x0_mse = args.clip ? joined<kVbTerms>(args.partial_sums, parts, n, 2) / size
                                        : sample.x0_scale * sample.x0_scale * mse;
        float* terms = args.terms + n * kVbTerms;
        terms[0] = static_cast<float>(mse);
        terms[1] = static_cast<float>(bound / (2.0 * kLn2));
        terms[2] = static_cast<float>(x0_mse);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
