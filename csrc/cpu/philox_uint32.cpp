// The integers behind the noise, for tests: compiled once, plain C++.
#include <algorithm>

#include "common/philox.h"
#include "cpu/parallel.h"
#include "cpu/philox_normal.h"

namespace diffkern {

void philox_uint32(const PhiloxArgs& args) {
    const int64_t total = args.shape.channels * args.shape.pixels;
    const NoiseArgs& noise = args.noise;
    auto body = [&](int64_t sample) {
        const auto offset = static_cast<uint64_t>(noise.samples[noise.index_per_sample ? sample : 0]);
        const auto index =
            static_cast<int64_t>(noise.index_per_sample ? offset : offset + static_cast<uint64_t>(sample));
        const CounterTail tail = counter_tail(noise.draws[noise.draw_per_sample ? sample : 0], index, noise.stream);
        uint32_t words[4];
        for (int64_t i = 0; i < total; i += 4) {
            philox4x32(philox_key(*noise.seed), static_cast<uint32_t>(i / 4), tail, words);
            std::copy(words, words + std::min<int64_t>(4, total - i), args.out_integers + sample * total + i);
        }
    };
    parallel_for(args.shape.samples, args.num_threads, body);
}

}  // namespace diffkern
