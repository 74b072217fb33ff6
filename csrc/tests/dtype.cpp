// The scalar conversions of bf16 and f16, over all their bit patterns, against rounding done in double.
#include "common/dtype.h"

#include "tests/rounding.h"

namespace diffkern::tests {
namespace {

template <class T>
T narrow(float value);
template <>
bf16 narrow<bf16>(float value) {
    return to_bf16(value);
}
template <>
f16 narrow<f16>(float value) {
    return to_f16(value);
}

// The value of a finite pattern from its fields.
template <class T>
double value_of_fields(uint32_t pattern) {
    constexpr Format format = Format::of<T>();
    const uint32_t fraction = pattern & ((1u << (format.digits - 1)) - 1);
    const auto biased = static_cast<int>((pattern & 0x7fffu) >> (format.digits - 1));
    const uint32_t significand = biased ? fraction + (1u << (format.digits - 1)) : fraction;
    const int exponent = (biased ? biased : 1) - 1 + format.lowest - (format.digits - 1);
    return (pattern & 0x8000u ? -1.0 : 1.0) * std::ldexp(static_cast<double>(significand), exponent);
}

template <class T>
void check_every_pattern() {
    const uint32_t infinity = Format::of<T>().infinity;
    for (uint32_t pattern = 0; pattern < 0x10000u; ++pattern) {
        const float value = to_float(T{static_cast<uint16_t>(pattern)});
        const uint32_t magnitude = pattern & 0x7fffu;
        CHECK(std::signbit(value) == (pattern >= 0x8000u), std::hex, pattern);
        if (magnitude > infinity) {
            CHECK(std::isnan(value) && (narrow<T>(value).bits & 0x7fffu) > infinity, std::hex, pattern);
            continue;
        }
        CHECK(magnitude == infinity ? std::isinf(value) : value == value_of_fields<T>(pattern), std::hex, pattern);
        CHECK(narrow<T>(value).bits == pattern, std::hex, pattern);
    }
}

template <class T>
void check_rounding() {
    for_hard_floats<T>([](float value) {
        const float actual = to_float(narrow<T>(value));
        CHECK(same_value(actual, rounded<T>(value)), value, " became ", actual, " for ", rounded<T>(value));
    });
}

}  // namespace

TEST(dtype, every_bf16) {
    check_every_pattern<bf16>();
}
TEST(dtype, every_f16) {
    check_every_pattern<f16>();
}
TEST(dtype, bf16_rounds_to_nearest_even) {
    check_rounding<bf16>();
}
TEST(dtype, f16_rounds_to_nearest_even) {
    check_rounding<f16>();
}
TEST(dtype, sizes) {
    CHECK(size_of(DType::f32) == 4 && size_of(DType::f64) == 8 && size_of(DType::bf16) == 2 &&
          size_of(DType::f16) == 2);
}

}  // namespace diffkern::tests
