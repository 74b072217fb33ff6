// The integers: Philox4x32-10 against Random123's known answers, the counter's layout, philox_uint32 over it.
#include "common/philox.h"

#include <cstring>

#include "cpu/philox_normal.h"
#include "tests/check.h"
#include "tests/philox_reference.h"

namespace diffkern::tests {
namespace {

void check_words(PhiloxKey key, uint32_t block, CounterTail tail, const uint32_t (&expected)[4]) {
    uint32_t words[4];
    philox4x32(key, block, tail, words);
    for (int i = 0; i < 4; ++i) CHECK(words[i] == expected[i], std::hex, words[i], " for ", expected[i]);
}

void check_tail(CounterTail tail, uint32_t c1, uint32_t c2, uint32_t c3) {
    CHECK(tail.c1 == c1 && tail.c2 == c2 && tail.c3 == c3, tail.c1, " ", tail.c2, " ", tail.c3);
}

}  // namespace

TEST(philox, known_answers) {
    const uint32_t ones = 0xffffffffu;
    check_words({0, 0}, 0, {0, 0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
    check_words({ones, ones}, ones, {ones, ones, ones}, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
    check_words({0xa4093822u, 0x299f31d0u}, 0x243f6a88u, {0x85a308d3u, 0x13198a2eu, 0x03707344u},
                {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

TEST(philox, seed_is_the_key) {
    const PhiloxKey key = philox_key(0x0123456789abcdef);
    CHECK(key.k0 == 0x89abcdefu && key.k1 == 0x01234567u);
    const PhiloxKey negative = philox_key(-3);
    CHECK(negative.k0 == 0xfffffffdu && negative.k1 == 0xffffffffu);
}

TEST(philox, counter_layout) {
    check_tail(counter_tail(7, 5, 3), 7, 5, 3);
    check_tail(counter_tail((int64_t{1} << 32) + 7, 5, 3), 7, 5, 3);
    check_tail(counter_tail(0, (int64_t{9} << 32) + 5, 3), 0, 5, 9 * 65536 + 3);
    check_tail(counter_tail(0, int64_t{1} << 48, 3), 0, 0, 3);
    check_tail(counter_tail(-1, -1, 2), 0xffffffffu, 0xffffffffu, 0xffff0000u + 2);
}

TEST(philox, uint32_of_shapes) {
    const int64_t seed = 0x123456789abcdef, offset = INT64_MAX - 1;
    const int64_t indices[] = {5, int64_t{1} << 40, -2}, draws[] = {4, 0, 1 << 20};
    for (const bool index_per_sample : {false, true})
        for (const bool draw_per_sample : {false, true})
            for (const int64_t pixels : {1, 2, 3, 4, 5, 7, 1023}) {
                const SampleShape shape = {3, 3, pixels, false};
                const NoiseArgs noise = {
                    &seed, draws, draw_per_sample, index_per_sample ? indices : &offset, index_per_sample, 6};
                const int64_t total = shape.channels * pixels;
                std::vector<int64_t> words(static_cast<size_t>(shape.samples * total), -1);
                philox_uint32({shape, noise, {}, words.data(), 1});
                for (int64_t i = 0; i < shape.samples * total; ++i) {
                    uint32_t expected[4];
                    philox4x32(philox_key(seed), static_cast<uint32_t>(i % total / 4), tail_of(noise, i / total),
                               expected);
                    const int64_t word = words[static_cast<size_t>(i)];
                    CHECK(word == expected[i % total % 4], "element ", i, " of ", pixels, " pixels: ", word);
                }
            }
}

}  // namespace diffkern::tests
