// normal.h: Box-Muller within 4 float32 ulp of the exact function of the integers, in the hard places and in many
// others.
#include "tests/check.h"
#include "tests/philox_reference.h"
#include "tests/probe.h"

#include <random>

namespace diffkern::tests {
namespace {

struct Pairs {
    std::vector<uint32_t> radius, angle;

    void add(uint32_t g0, uint32_t g1) {
        radius.push_back(g0);
        angle.push_back(g1);
    }
};

void check(const Pairs& pairs) {
    const size_t count = pairs.radius.size();
    std::vector<float> first(count), second(count);
    probe_box_muller(
        {pairs.radius.data(), pairs.angle.data(), first.data(), second.data(), static_cast<int64_t>(count)});
    for (size_t i = 0; i < count; ++i) {
        const long double r = radius_of(pairs.radius[i]);
        const Direction direction(pairs.angle[i]);
        const long double exact[] = {r * direction.cosine, r * direction.sine};
        const float actual[] = {first[i], second[i]};
        for (int k = 0; k < 2; ++k)
            CHECK(std::fabs(actual[k] - exact[k]) <= 4 * ulp(exact[k]), actual[k], " for ", exact[k],
                  " at g0 = ", pairs.radius[i], ", g1 = ", pairs.angle[i]);
    }
}

}  // namespace

// Uniforms next to 0, 1, 1/2 and sqrt(1/2), where the logarithm changes its form; angles next to every eighth of a
// turn.
TEST(normal, hard_places) {
    Pairs pairs;
    const uint32_t radii[] = {0, 0x80000000u, 0xB504F334u, 0x5A82799Au, 0x40000000u, 0xffffff80u};
    for (const uint32_t radius : radii)
        for (uint32_t eighth = 0; eighth < 8; ++eighth)
            for (uint32_t i = 0; i < 64; ++i)
                for (uint32_t j = 0; j < 64; ++j) pairs.add(radius + i - 32, eighth * 0x20000000u + j - 32);
    check(pairs);
}

// The worst pairs that searches over all words found (tests/ops/test_philox_normal.py) and their neighbours.
TEST(normal, worst_known) {
    Pairs pairs;
    const uint32_t worst[][2] = {{2595638848u, 4284334285u}, {2602648961u, 3231893720u}, {1579096767u, 537115569u}};
    for (const auto& pair : worst)
        for (uint32_t i = 0; i < 64; ++i)
            for (uint32_t j = 0; j < 64; ++j) pairs.add(pair[0] + i - 32, pair[1] + j - 32);
    check(pairs);
}

TEST(normal, many_words) {
    std::mt19937 engine(7);
    Pairs pairs;
    for (int i = 0; i < 1000000; ++i) {
        const auto g0 = static_cast<uint32_t>(engine());
        pairs.add(g0, static_cast<uint32_t>(engine()));
    }
    check(pairs);
}

}  // namespace diffkern::tests
