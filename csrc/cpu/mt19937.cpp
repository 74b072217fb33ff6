#include "cpu/mt19937.h"

#include <cstring>
#include <stdexcept>

namespace diffkern {
namespace {

constexpr int kWords = 624, kShift = 397;

// What torch keeps, in its order (ATen/CPUGeneratorImpl.cpp): seed, words left plus one, whether seeded, the next word,
// the words; behind them, untouched here, cached normals.
struct TorchState {
    uint64_t seed;
    int32_t left, seeded;
    uint64_t next;
    uint64_t words[kWords];
};

inline uint32_t twist(uint32_t high, uint32_t low) {
    return (((high & 0x80000000u) | (low & 0x7fffffffu)) >> 1) ^ (low & 1u ? 0x9908b0dfu : 0u);
}

void next_words(uint32_t* w) {
    for (int k = 0; k < kWords - kShift; ++k) w[k] = w[k + kShift] ^ twist(w[k], w[k + 1]);
    for (int k = kWords - kShift; k < kWords - 1; ++k) w[k] = w[k + kShift - kWords] ^ twist(w[k], w[k + 1]);
    w[kWords - 1] = w[kShift - 1] ^ twist(w[kWords - 1], w[0]);
}

}  // namespace

void advance_torch_generator(char* bytes, int64_t count) {
    TorchState state;
    static_assert(sizeof state < kTorchGeneratorBytes, "torch keeps more than this behind it");
    std::memcpy(&state, bytes, sizeof state);
    bool valid = state.seeded == 1 && state.left >= 1 && state.left <= kWords && state.next <= kWords && count >= 0 &&
                 (state.next == 0 || state.left + state.next == kWords + 1);
    uint32_t words[kWords];
    for (int k = 0; k < kWords; ++k) {
        valid = valid && state.words[k] <= 0xffffffffu;
        words[k] = static_cast<uint32_t>(state.words[k]);
    }
    if (!valid) throw std::invalid_argument("state is not that of a CPU torch.Generator");

    int64_t left = state.left - 1;  // words that can be taken before the next twist
    if (count <= left) {
        state.left -= static_cast<int32_t>(count);
        state.next += static_cast<uint64_t>(count);
    } else {
        for (count -= left; count > kWords; count -= kWords) next_words(words);
        next_words(words);
        state.left = static_cast<int32_t>(kWords + 1 - count);
        state.next = static_cast<uint64_t>(count);
        for (int k = 0; k < kWords; ++k) state.words[k] = words[k];
    }
    std::memcpy(bytes, &state, sizeof state);
}

}  // namespace diffkern
