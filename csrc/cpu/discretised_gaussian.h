// -ln of the probability that a Gaussian gives a pixel's grey level, with its derivatives by d = x0 - mu and by
// ln sigma^2: of the bin [x0 - h, x0 + h], or from an end bin to infinity (Ho et al. 2020, eq. 13). In units of sigma
// the bin is [z-, z+].
#pragma once

#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

struct GreyLevels {
    float half, end;  // h, and the |x0| beyond which an end bin begins
    double exact_half;

    explicit GreyLevels(int64_t levels) : exact_half(1.0 / static_cast<double>(levels - 1)) {
        half = static_cast<float>(exact_half);
        end = static_cast<float>(1.0 - exact_half > 0.999 ? 1.0 - exact_half : 0.999);
    }
};

struct Decoded {
    f32v value, of_difference, of_log_var;
};

// e^-z for z >= 0, and 0 where exp_of_minus may leave its smallest number: here it meets factors up to 1e36.
DIFFKERN_INLINE f32v vanishing_exp(f32v z) {
    return z > 87.0f ? f32v{} : exp_of_minus(z);
}

// z in [-limit, limit]; NaN stays.
DIFFKERN_INLINE f32v bounded(float limit, f32v z) {
    const f32v below = z > limit ? broadcast(limit) : z;
    return below < -limit ? broadcast(-limit) : below;
}

// With the CDF 1/(1 + e^-p), p = 2 sqrt(2/pi) (z + 0.044715 z^3), and a probability of 1e-12 at least, where the
// derivatives are 0. The probability is s(p) s(-q) (1 - e^-(p-q)) for the logistic function s and p - q had from
// z+ - z- = 2h/sigma, so that nothing cancels. 1/sigma and z are bounded where all has long reached its limit, so that
// no product overflows.
// Not inlined, so that its roundings are the same with and without the derivatives used.
__attribute__((noinline)) inline Decoded decode_tanh(f32v d, f32v log_var, f32v x0, const GreyLevels& grey) {
    const float slope = 1.59576912f, cubic = 0.044715f, least = -27.6310211f;
    const f32v inverse = at_most(exp_of_minus(0.5f * log_var), 1e11f);
    const f32v upper = bounded(1e12f, (d + grey.half) * inverse), lower = bounded(1e12f, (d - grey.half) * inverse);
    const f32v width = (2.0f * grey.half) * inverse;
    const f32v squares = upper * upper + upper * lower + lower * lower;
    const f32v p = slope * (upper + cubic * (upper * upper * upper));
    const f32v q = slope * (lower + cubic * (lower * lower * lower));
    const f32v apart = slope * width * (1.0f + cubic * squares);
    // e^-|p| and e^-|q|, and of them s(-p), s(q) and, up to a factor of 1 or e^p, s(p) and s(-q).
    const f32v zero = {};
    const f32v e_p = vanishing_exp(p < 0.0f ? -p : p), e_q = vanishing_exp(q < 0.0f ? -q : q);
    const f32v r_p = 1.0f / (1.0f + e_p), r_q = 1.0f / (1.0f + e_q);
    const f32v s_minus_p = p > 0.0f ? e_p * r_p : r_p, s_q = q < 0.0f ? e_q * r_q : r_q;
    const f32v ln_p = p < 0.0f ? p : zero, ln_q = q > 0.0f ? -q : zero;
    const f32v e_apart = vanishing_exp(apart);
    const f32v within = one_minus_exp(apart, e_apart);
    const f32v remainder = e_apart / within;  // 1/(e^(p-q) - 1)
    const f32v slope_p = slope * (1.0f + (3.0f * cubic) * (upper * upper));
    const f32v slope_q = slope * (1.0f + (3.0f * cubic) * (lower * lower));
    const f32v of_p = slope_p * s_minus_p, of_q = slope_q * s_q;

    const i32v first = -grey.end > x0, last = grey.end < x0;
    // 1/((1 + e_p)(1 + e_q)/within) as 1/(1 + odds), which keeps the digits of a value near 0.
    const f32v odds = first ? e_p : last ? e_q : (e_p + e_q + e_p * e_q + e_apart) / within;
    const f32v exponent = first ? ln_p : last ? ln_q : ln_p + ln_q;
    const f32v log_probability = exponent - log1p_positive(odds);
    const f32v by_mean = first  ? of_p
                         : last ? -of_q
                                : of_p - of_q + (3.0f * slope * cubic) * width * (upper + lower) * remainder;
    const f32v by_scale =
        first  ? upper * of_p
        : last ? -lower * of_q
               : upper * of_p - lower * of_q + slope * width * (1.0f + (3.0f * cubic) * squares) * remainder;
    const i32v clamped = log_probability < least;
    Decoded decoded = {clamped ? broadcast(-least) : -log_probability, clamped ? zero : -inverse * by_mean,
                       clamped ? zero : 0.5f * by_scale};
    // The exponentials may turn a NaN into a number.
    const i32v number = (d == d) & (log_var == log_var);
    const f32v nan = broadcast(__builtin_nanf(""));
    decoded.value = number ? decoded.value : nan;
    decoded.of_difference = number ? decoded.of_difference : nan;
    decoded.of_log_var = number ? decoded.of_log_var : nan;
    return decoded;
}

// ln Phi(z), to a few ulp of double at any z.
inline double log_normal_cdf(double z) {
    if (z > -20.0)
        return z > 5.0 ? __builtin_log1p(-0.5 * __builtin_erfc(z * 0.7071067811865476))
                       : __builtin_log(0.5 * __builtin_erfc(-z * 0.7071067811865476));
    // Mills' ratio as an asymptotic series in 1/z^2, here below 1/400.
    const double w = 1.0 / (z * z);
    double series = -135135.0;
    for (const double c : {10395.0, -945.0, 105.0, -15.0, 3.0, -1.0}) series = series * w + c;
    return -0.5 * z * z - 0.9189385332046727 - __builtin_log(-z) + __builtin_log1p(series * w);
}

// With the exact CDF, in double and log space; NaN stays.
inline void decode_exact(double d, double log_var, double x0, const GreyLevels& grey, double out[3]) {
    const double inverse = __builtin_exp(-0.5 * log_var);
    const double upper = (d + grey.exact_half) * inverse, lower = (d - grey.exact_half) * inverse;
    const bool first = -grey.end > x0, last = grey.end < x0;
    const double c = d * inverse, w = 2.0 * grey.exact_half * inverse;
    if (!first && !last && w * (1.0 + __builtin_fabs(c)) < 1e-3) {
        // A difference would cancel: phi(c) w (1 + (c^2 - 1) w^2/24 + ...), the next term being below 1e-15.
        const double square = w * w / 12.0, q = 0.5 * (c * c - 1.0) * square, rest = square / (1.0 + q);
        const double log_width = __builtin_log(2.0 * grey.exact_half) - 0.5 * log_var;
        out[0] = 0.5 * c * c + 0.9189385332046727 - log_width - __builtin_log1p(q);
        out[1] = inverse * c * (1.0 - rest);
        out[2] = 0.5 * (1.0 - c * c + (2.0 * c * c - 1.0) * rest);
        return;
    }
    double log_probability;
    if (first) {
        log_probability = log_normal_cdf(upper);
    } else if (last) {
        log_probability = log_normal_cdf(-lower);
    } else {
        // Phi(b) - Phi(a) on the side where both are small.
        const bool flipped = upper + lower > 0;
        const double b = log_normal_cdf(flipped ? -lower : upper), a = log_normal_cdf(flipped ? -upper : lower);
        const double u = a - b;
        log_probability = b + (u < -0.7 ? __builtin_log1p(-__builtin_exp(u)) : __builtin_log(-__builtin_expm1(u)));
    }
    auto density = [&](double z) { return __builtin_exp(-0.5 * z * z - 0.9189385332046727 - log_probability); };
    const double of_upper = last ? 0.0 : density(upper), of_lower = first ? 0.0 : density(lower);
    out[0] = -log_probability;
    out[1] = inverse * (of_lower - of_upper);
    // z phi(z) is 0 and not inf 0 where z is infinite.
    out[2] = 0.5 * ((of_upper == 0 ? 0.0 : upper * of_upper) - (of_lower == 0 ? 0.0 : lower * of_lower));
}

inline Decoded decode_exact(f32v d, f32v log_var, f32v x0, const GreyLevels& grey) {
    Decoded decoded;
    for (int i = 0; i < kLanes; ++i) {
        double out[3];
        decode_exact(d[i], log_var[i], x0[i], grey, out);
        decoded.value[i] = static_cast<float>(out[0]);
        decoded.of_difference[i] = static_cast<float>(out[1]);
        decoded.of_log_var[i] = static_cast<float>(out[2]);
    }
    return decoded;
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
