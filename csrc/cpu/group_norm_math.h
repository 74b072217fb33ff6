// What the contiguous and the channels-last kernels of group_norm share.
//
//     z = x_hat * gamma' + beta',  gamma' = gamma (1 + scale),  beta' = beta (1 + scale) + shift,  y = act(z)
//
// Statistics are sums of d = x - center and of d^2 over a block, the center near the block's first values; where that
// center turns out to be far from the mean (as a share of the spread) the block is read again with a better one. Blocks
// are joined by Chan's formula in double: exact to float32's rounding whatever the mean. With the mean split into a
// float and its remainder, x - mean loses nothing either.
//
// Both kernels work on d = x - mean with rstd folded into the coefficients: z = d a + beta', a = gamma' rstd. An offset
// is never added to a value: it moves a channel's mean where statistics are joined, and then d = x - (mean - offset).
#pragma once

#include "cpu/activation.h"
#include "cpu/group_norm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// gamma' and beta' of `count` channels of a sample. Room for `count` floats in each.
inline void affine_row(const GroupNormArgs& a, int64_t sample, int64_t first, int64_t count, float* gamma,
                       float* beta) {
    load_row(a.weight, sample, first, count, 1.0f, gamma);
    load_row(a.bias, sample, first, count, 0.0f, beta);
    constexpr int64_t kPiece = 64;
    float piece[kPiece];
    for (int64_t done = 0; a.scale && done < count; done += kPiece) {
        const int64_t n = count - done < kPiece ? count - done : kPiece;
        load_row(a.scale, sample, first + done, n, 0.0f, piece);
        for (int64_t i = 0; i < n; ++i) {
            gamma[done + i] *= 1.0f + piece[i];
            beta[done + i] *= 1.0f + piece[i];
        }
    }
    for (int64_t done = 0; a.shift && done < count; done += kPiece) {
        const int64_t n = count - done < kPiece ? count - done : kPiece;
        load_row(a.shift, sample, first + done, n, 0.0f, piece);
        for (int64_t i = 0; i < n; ++i) beta[done + i] += piece[i];
    }
}

// A center f standard deviations off costs the squares 1 + f^2 of their roundings. It is the mean of the first few
// values, and where it lies more than two off, that is d's mean^2 > kFar of d^2's mean, it is replaced.
constexpr float kFar = 4.0f / (1.0f + 4.0f);

// Count, mean and sum of squared deviations; merged by Chan, Golub and LeVeque (1983).
struct Moments {
    double count = 0, mean = 0, m2 = 0;

    void merge(double n, double other_mean, double other_m2) {
        if (count == 0) {
            count = n;
            mean = other_mean;
            m2 = other_m2;
            return;
        }
        const double share = n / (count + n);
        const double delta = other_mean - mean;
        mean += delta * share;
        m2 += other_m2 + delta * delta * (count * share);
        count += n;
    }
    double rstd(double eps) const {
        return 1.0 / __builtin_sqrt(m2 / count + eps);
    }
};

// A mean as the float next to it and the float next to what that leaves.
struct Split {
    float value, rest;

    explicit Split(double mean) : value(static_cast<float>(mean)), rest(static_cast<float>(mean - value)) {
    }
};

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
