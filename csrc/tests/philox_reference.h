// The noise as its definition reads: words of a sample's element from the scalar Philox, normals in long double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/philox.h"
#include "cpu/noise.h"

namespace diffkern::tests {

// cos and sin of 2 pi (g + 1/2) / 2^32. The quarter turn comes from the integer, so that nothing cancels next to it.
struct Direction {
    long double cosine, sine;

    explicit Direction(uint32_t g) {
        const uint32_t quarter = (g + 0x20000000u) >> 30;
        const auto rest = static_cast<int64_t>(g + 0x20000000u - (quarter << 30)) - 0x20000000;
        const long double angle =
            (static_cast<long double>(rest) + 0.5L) * (6.283185307179586476925286766559L / 0x1p32L);
        const long double c = std::cos(angle), s = std::sin(angle);
        cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
        sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    }
};

// sqrt(-2 ln((g + 1/2) / 2^32)), through log1p where the uniform is above 1/2.
inline long double radius_of(uint32_t g) {
    const long double below = (static_cast<long double>(g) + 0.5L) / 0x1p32L;
    const long double above = (static_cast<long double>(~g) + 0.5L) / 0x1p32L;
    return std::sqrt(-2 * (below > 0.5L ? std::log1p(-above) : std::log(below)));
}

// The normal of element i (in channel, pixel order) of a sample.
inline long double exact_normal(PhiloxKey key, CounterTail tail, int64_t i) {
    uint32_t words[4];
    philox4x32(key, static_cast<uint32_t>(i / 4), tail, words);
    const int64_t pair = i % 4 / 2 * 2;
    const Direction direction(words[pair + 1]);
    return radius_of(words[pair]) * (i % 2 ? direction.sine : direction.cosine);
}

// A unit in the last place of a float32 or float64 next to `value`.
inline long double ulp(long double value, int digits = 24) {
    return std::ldexp(1.0L, std::ilogb(value) - digits + 1);
}

// What a NoiseArgs means for one sample: the offset wraps at 2^64.
inline CounterTail tail_of(const NoiseArgs& noise, int64_t sample) {
    const auto offset = static_cast<uint64_t>(noise.samples[noise.index_per_sample ? sample : 0]);
    const uint64_t index = noise.index_per_sample ? offset : offset + static_cast<uint64_t>(sample);
    return counter_tail(noise.draws[noise.draw_per_sample ? sample : 0], static_cast<int64_t>(index), noise.stream);
}

}  // namespace diffkern::tests
