// m and x0 of a step before clamping, for solver_step and for the quantile of |x0| that is taken before it: one piece
// of code in which the fused operations are said outright, so that both come to the same bits.
#pragma once

#include "cpu/operand.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// m = r_n (u + w (c - u)), or the network's output itself without guidance. Args has the fields uncond, cond,
// guidance_scale, guidance_per_sample and guidance_rescale of SolverStepArgs.
template <class Real, class Access>
class GuidedMean {
 public:
    template <class Args>
    GuidedMean(const Args& args, int64_t sample)
        : uncond_(args.uncond, sample),
          cond_(args.cond, sample),
          guided_(static_cast<bool>(args.cond)),
          rescaled_(args.guidance_rescale != nullptr),
          scale_(guided_ ? static_cast<Real>(args.guidance_scale[args.guidance_per_sample ? sample : 0]) : Real{0}),
          rescale_(rescaled_ ? static_cast<Real>(args.guidance_rescale[sample]) : Real{1}) {
    }

    DIFFKERN_INLINE Vec<Real> load(int64_t i, int n) const {
        Vec<Real> m = uncond_.load(i, n);
        if (guided_) m = multiply_add(broadcast(scale_), cond_.load(i, n) - m, m);
        if (rescaled_) m = m * rescale_;
        return m;
    }

 private:
    Access uncond_, cond_;
    bool guided_, rescaled_;
    Real scale_, rescale_;
};

// a_x x + a_m m; an operand whose coefficient is 0 is not looked at.
template <class Real>
DIFFKERN_INLINE Vec<Real> predicted_x0(Real a_x, Vec<Real> x, Real a_m, Vec<Real> m) {
    Vec<Real> x0 = broadcast(Real{0});
    if (a_x != 0) x0 = a_x * x;
    if (a_m != 0) x0 = multiply_add(broadcast(a_m), m, x0);
    return x0;
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
