// Sums over the elements of each sample, by several threads and always in the same order: a sample is cut into parts
// whose borders depend on its shape and memory format alone, each part is summed by one thread, and the parts are added
// in order.
#pragma once

#include <cstdint>

#include "cpu/noise.h"

namespace diffkern {

// The most parts of a sample.
constexpr int64_t kSampleParts = 64;

}  // namespace diffkern

#ifdef DIFFKERN_ISA

namespace diffkern {
namespace DIFFKERN_ISA {

// A part is a few chunks, a task a few parts.
struct Parts {
    Chunks chunks;
    int64_t chunks_per_part, per_sample;

    explicit Parts(const SampleShape& shape) : chunks(shape) {
        chunks_per_part = (chunks.per_sample + kSampleParts - 1) / kSampleParts;
        per_sample = chunks.per_sample ? (chunks.per_sample + chunks_per_part - 1) / chunks_per_part : 0;
    }
};

constexpr int64_t kTasksPerThread = 16;

// make(sample).run(first, end, generated, sums) adds its kSums sums over the elements [first, end) of a sample; generated
// is their noise, or null without a source. Those of a part go to partial[kSums * part].
template <int kSums, class Make>
inline void sum_parts(const SampleShape& shape, const Parts& parts, const NoiseArgs* source, int num_threads,
                      double* partial, Make make) {
    const int64_t total = shape.channels * shape.pixels, count = shape.samples * parts.per_sample;
    const int64_t per_task = count / (kTasksPerThread * num_threads) + 1;
    auto sum_part = [&](int64_t part, NoiseBuffer<float>& noise) {
        const int64_t sample = part / parts.per_sample;
        const auto term = make(sample);
        const int64_t begin = part % parts.per_sample * parts.chunks_per_part * parts.chunks.size;
        double sums[kSums] = {};
        for (int64_t chunk = 0; chunk < parts.chunks_per_part; ++chunk) {
            const int64_t first = begin + chunk * parts.chunks.size;
            const int64_t end = first + parts.chunks.size < total ? first + parts.chunks.size : total;
            if (first >= end) break;
            if (source) noise.fill(noise_stream(*source, sample), first, end - first);
            term.run(first, end, source ? noise.values : nullptr, sums);
        }
        for (int k = 0; k < kSums; ++k) partial[kSums * part + k] = sums[k];
    };
    auto body = [&](int64_t task) {
        NoiseBuffer<float> noise(shape, parts.chunks.size);
        const int64_t end = (task + 1) * per_task < count ? (task + 1) * per_task : count;
        for (int64_t part = task * per_task; part < end; ++part) sum_part(part, noise);
    };
    parallel_for((count + per_task - 1) / per_task, num_threads, body);
}

// Sum number k of a sample.
template <int kSums>
inline double joined(const double* partial, const Parts& parts, int64_t sample, int k) {
    double sum = 0;
    for (int64_t part = 0; part < parts.per_sample; ++part) {
        sum += partial[kSums * (sample * parts.per_sample + part) + k];
    }
    return sum;
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
#endif
