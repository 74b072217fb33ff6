// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter at a time,
// and the library's counter layout (version 1). Plain C++ so that host and device code read the same lines. Functions
// are `static`: files that include this are compiled for several instruction sets and must not share their copies.
#pragma once

#include <cstdint>

namespace diffkern {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Words 1..3 of the counter; word 0 is the block number (element index div 4).
struct CounterTail {
    uint32_t c1, c2, c3;
};

struct PhiloxKey {
    uint32_t k0, k1;
};

static inline PhiloxKey philox_key(int64_t seed) {
    const auto bits = static_cast<uint64_t>(seed);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// c1 = draw, c2 = sample mod 2^32, c3 = (sample div 2^32)*2^16 + stream, all modulo 2^32.
static inline CounterTail counter_tail(int64_t draw, int64_t sample, int64_t stream) {
    const auto bits = static_cast<uint64_t>(sample);
    return {static_cast<uint32_t>(draw), static_cast<uint32_t>(bits),
            static_cast<uint32_t>((bits >> 32) << 16) + static_cast<uint32_t>(stream)};
}

static inline void philox4x32(PhiloxKey key, uint32_t block, CounterTail tail, uint32_t out[4]) {
    uint32_t c0 = block, c1 = tail.c1, c2 = tail.c2, c3 = tail.c3;
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        key.k0 += kPhiloxW0;
        key.k1 += kPhiloxW1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

}  // namespace diffkern
