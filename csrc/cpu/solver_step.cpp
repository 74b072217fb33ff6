// One row of a StepProgram, for every sample at once:
//
//     m  = r_n (u + w (c - u))                                 guidance
//     x0 = clamp(a_x x + a_m m, lo s_n, hi s_n) / s_n
//     x' = c_x x + c_m m + c_0 x0 + sum_k c_k h_k + c_z sigma z + (c_e + c_v sigma^2) e
//     h' = g_x x + g_m m + g_0 x0 + sum_k g_k h_k              up to two slots
//
// Reads each operand whose coefficients are not all zero once and writes x' (and h', s x') once: a DDPM step in float32
// is 12 bytes an element with its own noise. An operand with zero coefficients is not read, so a NaN in it is harmless.
// Every branch in the loop is the same for a whole sample.
#include "cpu/solver_step.h"

#include <initializer_list>

#include "cpu/guided_mean.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// sigma = exp(log_variance / 2)
DIFFKERN_INLINE f32v learned_sigma(f32v half_log_variance) {
    const f32v sigma = exp_clamped(half_log_variance);
    return half_log_variance == half_log_variance ? sigma : half_log_variance;  // NaN stays
}
DIFFKERN_INLINE f64v learned_sigma(f64v half_log_variance) {
    f64v sigma;
    for (int i = 0; i < kLanes; ++i) sigma[i] = __builtin_exp(half_log_variance[i]);
    return sigma;
}

// One row's linear combination of x, m, x0 and the slots.
template <class Real>
struct Combination {
    Real x, m, x0, slots[kMaxSlots];

    Combination(const double* base, const double* of_slots, int num_slots)
        : x(static_cast<Real>(base[0])), m(static_cast<Real>(base[1])), x0(static_cast<Real>(base[2])) {
        for (int k = 0; k < num_slots; ++k) slots[k] = static_cast<Real>(of_slots[k]);
    }
};

template <class Real, class Access>
class Row {
 public:
    Row(const SolverStepArgs& args, int64_t sample)
        : args_(args),
          row_(args.row[args.row_per_sample ? sample : 0]),
          c_(args.table + row_ * args.num_columns),
          state_(c_ + kCx, c_ + kFixedColumns, args.num_slots),
          write0_(c_ + first_block(), c_ + first_block() + 3, args.num_slots),
          write1_(c_ + second_block(), c_ + second_block() + 3, args.num_slots),
          slot0_(args.writes[2 * row_]),
          slot1_(args.writes[2 * row_ + 1]),
          x_(args.x, sample),
          var_(args.var, sample),
          extra_(args.extra, sample),
          noise_(args.noise, sample),
          out_(args.out, sample),
          x_in_(args.x_in, sample),
          sample_(sample) {
    }

    bool makes_noise() const {
        return c_[kCz] != 0.0 && !args_.noise;
    }

    void run(int64_t first, int64_t end, const Real* generated) const {
        using V = Vec<Real>;
        const bool need_x0 = state_.x0 != 0 || (slot0_ >= 0 && write0_.x0 != 0) || (slot1_ >= 0 && write1_.x0 != 0);
        const Real a_x = static_cast<Real>(c_[kAx]), a_m = static_cast<Real>(c_[kAm]);
        const bool need_x = state_.x != 0 || (need_x0 && a_x != 0) || (slot0_ >= 0 && write0_.x != 0) ||
                            (slot1_ >= 0 && write1_.x != 0);
        const bool need_m = state_.m != 0 || (need_x0 && a_m != 0) || (slot0_ >= 0 && write0_.m != 0) ||
                            (slot1_ >= 0 && write1_.m != 0);
        const Real c_z = static_cast<Real>(c_[kCz]), c_e = static_cast<Real>(c_[kCe]), c_v = static_cast<Real>(c_[kCv]);
        const bool need_extra = args_.extra && (c_e != 0 || c_v != 0);
        const bool need_sigma = args_.variance != Variance::fixed && (c_z != 0 || (need_extra && c_v != 0));
        const Real log_min = static_cast<Real>(c_[kLogVarMin]), log_max = static_cast<Real>(c_[kLogVarMax]);
        const Real s = args_.threshold ? static_cast<Real>(args_.threshold[sample_]) : 1;
        const V low = broadcast(static_cast<Real>(args_.clip_low) * s);
        const V high = broadcast(static_cast<Real>(args_.clip_high) * s);
        const Real input_scale = static_cast<Real>(c_[kScale]);
        const V zero = broadcast(static_cast<Real>(0));
        const GuidedMean<Real, Access> mean(args_, sample_);

        for_lanes(first, end, [&](int64_t i, int n) DIFFKERN_LAMBDA {
            const V x = need_x ? x_.load(i, n) : zero;
            const V m = need_m ? mean.load(i, n) : zero;
            V x0 = zero;
            if (need_x0) {
                x0 = predicted_x0(a_x, x, a_m, m);
                if (args_.clip) {
                    // Written so that a NaN passes through both comparisons.
                    x0 = x0 < low ? low : x0;
                    x0 = x0 > high ? high : x0;
                    if (args_.threshold) x0 = x0 / s;
                }
            }
            V h[kMaxSlots];
            for (int k = 0; k < args_.num_slots; ++k)
                if (reads_slot(k)) h[k] = Access(args_.slots[k], sample_).load(i, n);

            V acc = combine(state_, x, m, x0, h);
            V sigma = zero;
            if (need_sigma) {
                V log_variance = var_.load(i, n);
                if (args_.variance == Variance::learned_range) {
                    const V fraction = (log_variance + static_cast<Real>(1)) * static_cast<Real>(0.5);
                    log_variance = fraction * log_max + (static_cast<Real>(1) - fraction) * log_min;
                }
                sigma = learned_sigma(log_variance * static_cast<Real>(0.5));
            }
            if (c_z != 0) {
                V z = generated ? load_n(generated + (i - first), n) : noise_.load(i, n);
                if (args_.variance != Variance::fixed) z = z * sigma;
                acc = acc + c_z * z;
            }
            if (need_extra) {
                const V e = extra_.load(i, n);
                if (c_e != 0) acc = acc + c_e * e;
                if (c_v != 0) acc = acc + (args_.variance == Variance::fixed ? c_v * e : c_v * (sigma * sigma * e));
            }
            // Every load of this piece is done: out may be x, and a slot may be written where it was read.
            if (slot0_ >= 0) Access(args_.slots[slot0_], sample_).store(i, combine(write0_, x, m, x0, h), n);
            if (slot1_ >= 0) Access(args_.slots[slot1_], sample_).store(i, combine(write1_, x, m, x0, h), n);
            out_.store(i, acc, n);
            if (args_.x_in) x_in_.store(i, acc * input_scale, n);
        });
    }

 private:
    int64_t first_block() const {
        return kFixedColumns + args_.num_slots;
    }
    int64_t second_block() const {
        return first_block() + 3 + args_.num_slots;
    }

    DIFFKERN_INLINE bool reads_slot(int k) const {
        return state_.slots[k] != 0 || (slot0_ >= 0 && write0_.slots[k] != 0) || (slot1_ >= 0 && write1_.slots[k] != 0);
    }

    DIFFKERN_INLINE Vec<Real> combine(const Combination<Real>& c, Vec<Real> x, Vec<Real> m, Vec<Real> x0,
                                      const Vec<Real>* h) const {
        Vec<Real> acc = broadcast(static_cast<Real>(0));
        if (c.x != 0) acc = c.x * x;
        if (c.m != 0) acc = acc + c.m * m;
        if (c.x0 != 0) acc = acc + c.x0 * x0;
        for (int k = 0; k < args_.num_slots; ++k)
            if (c.slots[k] != 0) acc = acc + c.slots[k] * h[k];
        return acc;
    }

    const SolverStepArgs& args_;
    int64_t row_;
    const double* c_;
    Combination<Real> state_, write0_, write1_;
    int64_t slot0_, slot1_;
    Access x_, var_, extra_, noise_, out_, x_in_;
    int64_t sample_;
};

template <class Real, class Access>
static void run(const SolverStepArgs& args) {
    const Chunks chunks(args.shape);
    NoiseArgs source = args.source;
    source.draws = args.row;
    source.draw_per_sample = args.row_per_sample;
    for_each_chunk(args.shape, chunks, args.num_threads, [&](int64_t sample, int64_t first, int64_t end) {
        const Row<Real, Access> row(args, sample);
        if (!row.makes_noise()) return row.run(first, end, nullptr);
        NoiseBuffer<Real> noise(args.shape, chunks.size);
        noise.fill(noise_stream(source, sample), first, end - first);
        row.run(first, end, noise.values);
    });
}

static bool all_float32(const SolverStepArgs& args) {
    bool all = args.out.dtype == DType::f32;
    for (const Operand& operand : {args.x, args.uncond, args.cond, args.var, args.extra, args.noise, args.x_in})
        all = all && operand.absent_or(DType::f32);
    for (int k = 0; k < args.num_slots; ++k) all = all && args.slots[k].dtype == DType::f32;
    return all;
}

void solver_step(const SolverStepArgs& args) {
    if (args.out.dtype == DType::f64) return run<double, Plain<double>>(args);
    all_float32(args) ? run<float, Plain<float>>(args) : run<float, Cursor<float>>(args);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
