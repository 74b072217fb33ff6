// A number and a bound on what the kernel's arithmetic may have added to it: the tests' oracles compute with these, so
// that a tolerance is what the formula allows and never a constant that somebody chose. Values are long double; each
// operation adds half a unit in the last place of the arithmetic under test (Wilkinson's running error analysis).
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace diffkern::tests {

using Wide = long double;

// How the operations round: the largest relative error of one, and the smallest subnormal number.
struct Arithmetic {
    Wide unit, smallest;
};
constexpr Arithmetic kFloat = {0x1p-24L, 0x1p-149L}, kDouble = {0x1p-53L, 0x1p-1074L};

inline Arithmetic arithmetic_of(DType dtype) {
    return dtype == DType::f64 ? kDouble : kFloat;
}

// Half a unit in the last place of `value` as it is stored.
inline Wide storage_rounding(DType dtype, Wide value) {
    const int digits = dtype == DType::f64 ? 53 : dtype == DType::f32 ? 24 : dtype == DType::bf16 ? 8 : 11;
    const int lowest = dtype == DType::f64 ? -1022 : dtype == DType::f16 ? -14 : -126;
    const int exponent = value == 0 ? lowest : std::ilogb(value);
    return std::ldexp(0.5L, (exponent < lowest ? lowest : exponent) - digits + 1);
}

struct Bounded {
    Wide value = 0, error = 0;
    Arithmetic arithmetic = kFloat;

    Bounded(Wide value, Wide error, Arithmetic arithmetic) : value(value), error(error), arithmetic(arithmetic) {
    }
    // A number that the kernel reads or holds exactly.
    Bounded(Wide value, Arithmetic arithmetic) : Bounded(value, 0, arithmetic) {
    }

    Bounded rounded() const {
        return {value, error + arithmetic.unit * (std::fabs(value) + error) + arithmetic.smallest, arithmetic};
    }
    // Whether a kernel that computes this and stores it as `dtype` may give `actual`.
    bool allows(double actual, DType dtype) const {
        if (std::isnan(value)) return std::isnan(actual);
        const Wide rounding = storage_rounding(dtype, std::fabs(value) + error);
        return std::fabs(static_cast<Wide>(actual) - value) <= error + rounding;
    }
};

// A coefficient that the kernel casts from double to its arithmetic's type.
inline Bounded coefficient(double value, Arithmetic arithmetic) {
    return Bounded(value, arithmetic).rounded();
}

inline Bounded operator+(const Bounded& a, const Bounded& b) {
    return Bounded(a.value + b.value, a.error + b.error, a.arithmetic).rounded();
}
inline Bounded operator-(const Bounded& a, const Bounded& b) {
    return Bounded(a.value - b.value, a.error + b.error, a.arithmetic).rounded();
}
inline Bounded operator*(const Bounded& a, const Bounded& b) {
    const Wide error = std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error;
    return Bounded(a.value * b.value, error, a.arithmetic).rounded();
}
inline Bounded operator/(const Bounded& a, const Bounded& b) {
    const Wide quotient = a.value / b.value;
    const Wide error = (a.error + std::fabs(quotient) * b.error) / (std::fabs(b.value) - b.error);
    return Bounded(quotient, error, a.arithmetic).rounded();
}
// NaN passes through.
inline Bounded clamp(const Bounded& a, const Bounded& low, const Bounded& high) {
    const Wide value = a.value < low.value ? low.value : a.value > high.value ? high.value : a.value;
    return {value, std::fmax(a.error, std::fmax(low.error, high.error)), a.arithmetic};
}
// `ulps`: what the kernel's exponential promises, in units of the last place.
inline Bounded exp(const Bounded& a, Wide ulps) {
    const Wide value = std::exp(a.value);
    return {value, value * (std::expm1(a.error) + 2 * ulps * a.arithmetic.unit), a.arithmetic};
}

}  // namespace diffkern::tests
