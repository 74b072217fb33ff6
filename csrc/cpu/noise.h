// The noise arguments that every op shares, and how a pointwise op cuts its work.
#pragma once

#include <cstdint>

namespace diffkern {

// Counter-based noise: null `seed` means that there is none. `samples` is one offset or one index per sample, `draws`
// one number or one per sample.
struct NoiseArgs {
    const int64_t* seed = nullptr;
    const int64_t* draws = nullptr;
    bool draw_per_sample = false;
    const int64_t* samples = nullptr;
    bool index_per_sample = false;
    int64_t stream = 0;
};

// The shape of N samples, each `channels` x `pixels`.
struct SampleShape {
    int64_t samples = 0, channels = 0, pixels = 0;
    bool channels_last = false;
};

}  // namespace diffkern

#ifdef DIFFKERN_ISA
#include "cpu/normal.h"
#include "cpu/parallel.h"

namespace diffkern {
namespace DIFFKERN_ISA {

inline NoiseStream noise_stream(const NoiseArgs& args, int64_t sample) {
    const int64_t draw = args.draws[args.draw_per_sample ? sample : 0];
    // An offset may be anything in int64: the sum wraps, as the reference's does.
    const int64_t index =
        args.index_per_sample
            ? args.samples[sample]
            : static_cast<int64_t>(static_cast<uint64_t>(args.samples[0]) + static_cast<uint64_t>(sample));
    return {philox_key(*args.seed), counter_tail(draw, index, args.stream)};
}

// A task is a piece of one sample that stays in the first-level cache with its noise. In channels-last order it is
// whole pixels, and a multiple of four of them, so that no counter is computed twice.
constexpr int64_t kChunk = 2048;

struct Chunks {
    int64_t size, per_sample;

    explicit Chunks(const SampleShape& shape) {
        const int64_t total = shape.channels * shape.pixels;
        size = kChunk;
        if (shape.channels_last) {
            const int64_t pixels = kChunk / (shape.channels ? shape.channels : 1) / 32 * 32;
            size = (pixels < 32 ? 32 : pixels) * shape.channels;
        }
        per_sample = total ? (total + size - 1) / size : 0;
    }
};

// Runs fn(sample, first, end) over the chunks of all samples, several chunks a task: some sixteen tasks a thread are
// enough to balance, and too few for their counter to cost anything.
template <class Fn>
inline void for_each_chunk(const SampleShape& shape, const Chunks& chunks, int num_threads, Fn fn) {
    const int64_t total = shape.channels * shape.pixels, count = shape.samples * chunks.per_sample;
    const int64_t of_task = count / (16 * static_cast<int64_t>(num_threads)) + 1;
    auto body = [&](int64_t task) {
        const int64_t last = (task + 1) * of_task < count ? (task + 1) * of_task : count;
        for (int64_t i = task * of_task; i < last; ++i) {
            const int64_t first = i % chunks.per_sample * chunks.size;
            fn(i / chunks.per_sample, first, first + chunks.size < total ? first + chunks.size : total);
        }
    };
    parallel_for((count + of_task - 1) / of_task, num_threads, body);
}

// Room for the noise of one chunk: on the stack as a rule, on the heap where channels last makes chunks large.
template <class Real>
class NoiseBuffer {
 public:
    NoiseBuffer(const SampleShape& shape, int64_t size) {
        const int64_t row = shape.channels_last && shape.channels ? size / shape.channels : 0;
        values = size + row <= kInline ? inline_ : heap_ = new Real[static_cast<unsigned long>(size + row)];
        row_ = values + size;
        layout_ = {shape.channels, shape.pixels, shape.channels_last};
    }
    ~NoiseBuffer() {
        delete[] heap_;
    }
    NoiseBuffer(const NoiseBuffer&) = delete;
    NoiseBuffer& operator=(const NoiseBuffer&) = delete;

    void fill(NoiseStream stream, int64_t first, int64_t count) {
        fill_normals(stream, layout_, first, count, values, row_);
    }

    Real* values;

 private:
    static constexpr int64_t kInline = 2 * kChunk;
    Real inline_[kInline];
    Real* heap_ = nullptr;
    Real* row_;
    SampleLayout layout_;
};

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
#endif
