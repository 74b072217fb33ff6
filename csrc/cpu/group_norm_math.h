// What the contiguous and the channels-last kernels of group_norm share.
//
//     z = x_hat * gamma' + beta',  gamma' = gamma (1 + scale),  beta' = beta (1 + scale) + shift,  y = act(z)
//
// Statistics are two passes over a block that is in the first-level cache, blocks joined by Chan's formula in double:
// exact to float32's rounding whatever the mean. With the mean split into a float and its remainder, x - mean loses
// nothing either.
#pragma once

#include "cpu/group_norm.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class T>
class Scratch {
 public:
    explicit Scratch(int64_t size) : data_(new T[static_cast<unsigned long>(size > 0 ? size : 1)]) {
    }
    ~Scratch() {
        delete[] data_;
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() {
        return data_;
    }

 private:
    T* data_;
};

inline float gamma_prime(const GroupNormArgs& a, int64_t sample, int64_t channel) {
    return read(a.weight, sample, channel, 1.0f) * (1.0f + read(a.scale, sample, channel, 0.0f));
}
inline float beta_prime(const GroupNormArgs& a, int64_t sample, int64_t channel) {
    return read(a.bias, sample, channel, 0.0f) * (1.0f + read(a.scale, sample, channel, 0.0f)) +
           read(a.shift, sample, channel, 0.0f);
}

// Count, mean and sum of squared deviations; merged by Chan, Golub and LeVeque (1983).
struct Moments {
    double count = 0, mean = 0, m2 = 0;

    void merge(double n, double other_mean, double other_m2) {
        const double total = count + n;
        const double delta = other_mean - mean;
        mean += delta * (n / total);
        m2 += other_m2 + delta * delta * (count * n / total);
        count = total;
    }
    double rstd(double eps) const {
        return 1.0 / __builtin_sqrt(m2 / count + eps);
    }
};

template <bool kSilu>
DIFFKERN_INLINE f32v activate(f32v z) {
    return kSilu ? z * sigmoid(z) : z;
}

// d act(z) / dz times dy
template <bool kSilu>
DIFFKERN_INLINE f32v activation_backward(f32v z, f32v dy) {
    if (!kSilu) return dy;
    const f32v s = sigmoid(z);
    return dy * (s + s * (z - z * s));
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
