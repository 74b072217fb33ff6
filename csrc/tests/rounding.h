// Rounding to the 16-bit types done in double, and the float32 values at which a conversion could go wrong.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "tests/check.h"

namespace diffkern::tests {

struct Format {
    int digits, lowest;  // of the significand, with the leading one; the exponent of the smallest normal number
    uint32_t infinity;   // its bits

    template <class T>
    static constexpr Format of() {
        return std::is_same<T, bf16>::value ? Format{8, -126, 0x7f80u} : Format{11, -14, 0x7c00u};
    }
};

// To nearest, ties to even; infinity from half a step above the largest number; NaN stays.
template <class T>
double rounded(double value) {
    constexpr Format format = Format::of<T>();
    if (value == 0 || !std::isfinite(value)) return value;
    const int exponent = std::ilogb(value);
    const double step = std::ldexp(1.0, (exponent < format.lowest ? format.lowest : exponent) - format.digits + 1);
    const double nearest = std::nearbyint(value / step) * step;
    const double limit = std::ldexp(1.0, 2 - format.lowest);  // one step above the largest
    return std::fabs(nearest) < limit ? nearest : std::copysign(std::numeric_limits<double>::infinity(), value);
}

// The same number with the same sign, or both NaN.
inline bool same_value(double a, double b) {
    return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Half way between any two neighbours of T and the floats next to that, of both signs; then a walk over all of float32.
template <class T, class Fn>
void for_hard_floats(Fn fn) {
    const uint32_t infinity = Format::of<T>().infinity;
    const float inf = std::numeric_limits<float>::infinity();
    for (uint32_t pattern = 0; pattern < infinity; ++pattern) {
        const auto low = static_cast<double>(to_float(T{static_cast<uint16_t>(pattern)}));
        const double high = pattern + 1 < infinity
                                ? static_cast<double>(to_float(T{static_cast<uint16_t>(pattern + 1)}))
                                : std::ldexp(1.0, 2 - Format::of<T>().lowest);
        const auto half = static_cast<float>(0.5 * (low + high));
        for (const float value : {half, std::nextafter(half, inf), std::nextafter(half, 0.0f)}) {
            fn(value);
            fn(-value);
        }
    }
    constexpr uint32_t kStep = 4099;
    for (uint32_t bits = 0; bits < 0xffffffffu - kStep; bits += kStep) fn(float_of(bits));
}

}  // namespace diffkern::tests
