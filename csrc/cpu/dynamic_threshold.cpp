// s_n = the `ratio` quantile of |x0| over sample n, linearly interpolated, clamped to [1, largest], with
// x0 = a_x x + a_m m as solver_step will compute it. Reads x and m once, 8 bytes an element in float32 (12 under
// guidance), into scratch of one sample a task, and selects there: bound by the passes of the selection over what is in
// the cache. A NaN orders behind every number, as it does for torch's sort.
#include "cpu/dynamic_threshold.h"

#include <initializer_list>

#include "cpu/guided_mean.h"
#include "cpu/order_statistics.h"
#include "cpu/parallel.h"
#include "cpu/solver_step.h"

namespace diffkern {
namespace DIFFKERN_ISA {

static_assert(16 % kLanes == 0, "threshold_scratch counts on vectors of 16 values at most");

DIFFKERN_INLINE f32v absolute(f32v v) {
    return as_float(as_bits(v) & 0x7fffffffu);
}
DIFFKERN_INLINE f64v absolute(f64v v) {
    return reinterpret_cast<f64v>(reinterpret_cast<i64v>(v) & INT64_MAX);
}

// |x0| of a whole sample.
template <class Real, class Access>
static void write_magnitudes(const DynamicThresholdArgs& args, int64_t sample, Real* magnitudes) {
    using V = Vec<Real>;
    const double* c = args.table + args.row[args.row_per_sample ? sample : 0] * args.num_columns;
    const Real a_x = static_cast<Real>(c[kAx]), a_m = static_cast<Real>(c[kAm]);
    const Access x(args.x, sample);
    const GuidedMean<Real, Access> mean(args, sample);
    const V zero = broadcast(Real{0});
    for_lanes(0, args.shape.channels * args.shape.pixels, [&](int64_t i, int n) DIFFKERN_LAMBDA {
        const V x0 = predicted_x0(a_x, a_x != 0 ? x.load(i, n) : zero, a_m, a_m != 0 ? mean.load(i, n) : zero);
        store_n(magnitudes + i, absolute(x0), n);
    });
}

static double quantile(double lower, double upper, double weight) {
    const double difference = upper - lower;
    return weight < 0.5 ? lower + weight * difference : upper - (1 - weight) * difference;
}

template <class Real, class Access>
static void run(const DynamicThresholdArgs& args) {
    const int64_t size = args.shape.channels * args.shape.pixels, samples = args.shape.samples;
    if (size == 0) {
        for (int64_t sample = 0; sample < samples; ++sample) args.threshold[sample] = 1;
        return;
    }
    const double position = args.ratio * static_cast<double>(size - 1);
    const auto low = static_cast<int64_t>(position);
    auto body = [&](int64_t task) {
        Real* magnitudes = static_cast<Real*>(args.scratch) + task * threshold_scratch(size);
        for (int64_t sample = task; sample < samples; sample += args.num_tasks) {
            write_magnitudes<Real, Access>(args, sample, magnitudes);
            const Neighbours<Real> found = OrderStatistics<Real>(magnitudes, size).at(low);
            double s = quantile(found.lower, found.upper, position - static_cast<double>(low));
            // Written so that a NaN passes through both comparisons. Below 1, `largest` comes before the 1.
            if (s < 1) s = 1;
            args.threshold[sample] = s > args.largest ? args.largest : s;
        }
    };
    parallel_for(args.num_tasks, args.num_tasks, body);
}

void dynamic_threshold(const DynamicThresholdArgs& args) {
    if (args.x.dtype == DType::f64) return run<double, Plain<double>>(args);
    bool all_float = true;
    for (const Operand& operand : {args.x, args.uncond, args.cond})
        all_float = all_float && operand.absent_or(DType::f32);
    all_float ? run<float, Plain<float>>(args) : run<float, Cursor<float>>(args);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
