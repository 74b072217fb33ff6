// Storage types and their conversion to and from float32, one value at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace diffkern {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

static inline int64_t size_of(DType dtype) {
    return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline float to_float(float value) {
    return value;
}

static inline float to_float(bf16 value) {
    return float_of(static_cast<uint32_t>(value.bits) << 16);
}

// Round to nearest even; NaN stays NaN.
static inline bf16 to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

static inline float to_float(f16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // Rebias by a multiplication, which also normalises subnormals exactly.
    return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
}

static inline f16 to_f16(float value) {
    const uint32_t bits = bits_of(value);
    const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above
    if (magnitude < 0x38800000u) {
        // Below 2^-14 the result is subnormal: adding 2^-1 puts the rounding where float16's last bit is.
        const float shifted = float_of(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace diffkern
