// advance_torch_generator against std::mt19937, which makes the same numbers from the same seed.
#include "cpu/mt19937.h"

#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "tests/check.h"

namespace diffkern::tests {
namespace {

constexpr int kWords = 624;

// The bytes of torch.Generator.get_state(), of exactly their size; what is behind the words is not the twister's.
class State {
 public:
    // Where the fields begin: the seed, words left plus one, whether seeded, the next word, the words, what is behind.
    static constexpr size_t kLeft = 8, kSeeded = 12, kNext = 16, kFirst = 24, kEnd = kFirst + 8 * kWords;

    // As torch.Generator.manual_seed leaves it.
    explicit State(uint32_t seed) : bytes_(static_cast<size_t>(kTorchGeneratorBytes)) {
        for (size_t i = kEnd; i < bytes_.size(); ++i) bytes_[i] = static_cast<char>(7 * i);
        put<uint64_t>(0, seed);
        put<int32_t>(kLeft, 1);
        put<int32_t>(kSeeded, 1);
        put<uint64_t>(kNext, 0);
        for (uint32_t i = 0, word = seed; i < kWords; word = 1812433253u * (word ^ (word >> 30)) + ++i)
            put<uint64_t>(kFirst + 8 * i, word);
    }

    void advance(int64_t count) {
        advance_torch_generator(bytes_.data(), count);
    }
    // The next number, drawn as torch draws it.
    uint32_t draw() {
        const auto left = get<int32_t>(kLeft) - 1;
        put<int32_t>(kLeft, left);
        if (left == 0) {
            for (int k = 0; k < kWords; ++k) set_word(k, word(k + 397) ^ mixed(word(k), word(k + 1)));
            put<int32_t>(kLeft, kWords);
            put<uint64_t>(kNext, 0);
        }
        const auto next = get<uint64_t>(kNext);
        put<uint64_t>(kNext, next + 1);
        uint32_t y = word(static_cast<int>(next));
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        return y ^ (y >> 18);
    }
    template <class T>
    void put(size_t at, T value) {
        std::memcpy(&bytes_[at], &value, sizeof value);
    }
    bool operator==(const State& other) const {
        return bytes_ == other.bytes_;
    }

 private:
    template <class T>
    T get(size_t at) const {
        T value;
        std::memcpy(&value, &bytes_[at], sizeof value);
        return value;
    }
    uint32_t word(int k) const {
        return static_cast<uint32_t>(get<uint64_t>(kFirst + 8 * static_cast<size_t>(k % kWords)));
    }
    void set_word(int k, uint32_t value) {
        put<uint64_t>(kFirst + 8 * static_cast<size_t>(k), value);
    }
    static uint32_t mixed(uint32_t high, uint32_t low) {
        const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
        return (y >> 1) ^ (y % 2 ? 0x9908b0dfu : 0u);
    }

    std::vector<char> bytes_;
};

bool refuses(State& state, int64_t count) {
    try {
        state.advance(count);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

constexpr int64_t kCounts[] = {0, 1, 15, 16, 622, 623, 624, 625, 1247, 1248, 1249, 1871, 1872, 1873, 100000};

}  // namespace

TEST(mt19937, numbers_of_the_standard) {
    for (const uint32_t seed : {0u, 1u, 5489u, 0xffffffffu})
        for (const int64_t count : kCounts) {
            std::mt19937 expected(seed);
            expected.discard(static_cast<unsigned long long>(count));
            State state(seed);
            state.advance(count);
            for (int i = 0; i < 2 * kWords; ++i) {
                const auto wanted = static_cast<uint32_t>(expected());
                CHECK(state.draw() == wanted, "seed ", seed, ", number ", i, " after ", count);
            }
        }
}

// Not only the numbers: every byte is what drawing leaves.
TEST(mt19937, state_of_drawing) {
    for (const int64_t before : {0, 1, 16, 623, 624, 625, 1000, 1248})
        for (const int64_t count : kCounts) {
            State drawn(17), advanced(17);
            for (int64_t i = 0; i < before; ++i) {
                drawn.draw();
                advanced.draw();
            }
            for (int64_t i = 0; i < count; ++i) drawn.draw();
            advanced.advance(count);
            CHECK(advanced == drawn, count, " after ", before);
        }
}

TEST(mt19937, refused_states_are_left) {
    const auto check = [](const char* what, int64_t count, auto change) {
        State state(3);
        for (int i = 0; i < 10; ++i) state.draw();
        change(state);
        const State before = state;
        CHECK(refuses(state, count), what);
        CHECK(state == before, what, ": the state changed");
    };
    for (const int64_t count : {0, 1, 700}) {
        check("not seeded", count, [](State& state) { state.put<int32_t>(State::kSeeded, 0); });
        check("seeded twice", count, [](State& state) { state.put<int32_t>(State::kSeeded, 2); });
        check("none left", count, [](State& state) { state.put<int32_t>(State::kLeft, 0); });
        check("fewer than none left", count, [](State& state) { state.put<int32_t>(State::kLeft, INT32_MIN); });
        check("too many left", count, [](State& state) { state.put<int32_t>(State::kLeft, kWords + 1); });
        check("next beyond the words", count, [](State& state) { state.put<uint64_t>(State::kNext, kWords + 1); });
        check("next far beyond", count, [](State& state) { state.put<uint64_t>(State::kNext, UINT64_MAX); });
        check("first word too long", count, [](State& state) { state.put<uint64_t>(State::kFirst, 1ull << 32); });
        check("last word too long", count, [](State& state) { state.put(State::kEnd - 8, UINT64_MAX); });
    }
    check("backwards", -1, [](State&) {});
    check("far backwards", INT64_MIN, [](State&) {});
}

}  // namespace diffkern::tests
