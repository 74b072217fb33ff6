// What the forward and the backward kernels of channel_rms_norm share.
//
//     u = x / max(norm, eps),  z = u gamma + shift,  gamma = sqrt(C) weight (1 + scale),  y = act(z)
//
// Memory lies in one of two ways. As planes (contiguous tensors) the channels of a pixel are far apart: a block of
// pixels, a few hundred of them, is read from every plane, and kept in float32 in a scratch that fits the second-level
// cache. In the tensor itself the rows of such a block are a power of two apart more often than not, and would push
// each other out of it. As rows (channels last, or one pixel a sample) a pixel's channels are next to each other.
//
// A unit of work is some 32 K values of one sample; which values make a unit depends on the shape alone.
#pragma once

#include "cpu/activation.h"
#include "cpu/channel_rms_norm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr int64_t kUnit = 32768;     // values
constexpr int64_t kScratch = 32768;  // values of a block of planes
constexpr int64_t kRows = 32;        // pixels of a block of rows: a multiple of kLanes

inline int64_t whole_vectors(int64_t count) {
    return (count + kLanes - 1) / kLanes * kLanes;
}

// How the pixels of a sample are cut.
struct Cut {
    int64_t samples, channels, pixels;
    bool rows;
    int64_t block, unit;  // pixels of a block, and of a unit, which is a number of blocks
    int64_t units;        // of a sample

    explicit Cut(const ChannelRmsNormArgs& args)
        : samples(args.shape.samples),
          channels(args.shape.channels),
          pixels(args.shape.pixels),
          rows(args.shape.channels_last || args.shape.pixels == 1) {
        // Where all samples have the same parameters, rows need not know of samples.
        if (rows && !args.scale && !args.shift) {
            pixels *= samples;
            samples = 1;
        }
        block = kRows;
        if (!rows) {
            block = kScratch / channels / kRows * kRows;
            if (block < 64) block = 64;
            if (block > 512) block = 512;
            if (block > pixels) block = whole_vectors(pixels);
        }
        const int64_t blocks = kUnit / (block * channels);
        unit = block * (blocks < 1 ? 1 : blocks);
        units = (pixels + unit - 1) / unit;
    }
};

// gamma and shift of a sample's channels, with zeros to whole vectors.
struct SampleParameters {
    Scratch<float> gamma, shift;

    explicit SampleParameters(int64_t channels) : gamma(whole_vectors(channels)), shift(whole_vectors(channels)) {
    }
    void load(const ChannelRmsNormArgs& args, int64_t sample) {
        const int64_t channels = args.shape.channels;
        const float root = __builtin_sqrtf(static_cast<float>(channels));
        float* scale = shift;  // its place is free until the end
        load_row(args.weight, 0, 0, channels, 1.0f, gamma);
        load_row(args.scale, sample, 0, channels, 0.0f, scale);
        for (int64_t c = 0; c < channels; ++c) gamma[c] *= root * (1.0f + scale[c]);
        load_row(args.shift, sample, 0, channels, 0.0f, shift);
        for (int64_t c = channels; c < whole_vectors(channels); ++c) gamma[c] = shift[c] = 0.0f;
    }
};

// Runs fn(memory, sample, unit, first pixel, end) for every unit; `Memory` is what a task works in, made from the cut,
// and has the parameters of the sample loaded. Small units go several to a task.
template <class Memory, class Fn>
void for_each_unit(const ChannelRmsNormArgs& args, const Cut& cut, Fn fn) {
    const int64_t count = cut.samples * cut.units;
    const int64_t size = (cut.unit < cut.pixels ? cut.unit : cut.pixels) * cut.channels;
    const int64_t of_task = kUnit / 2 / size + 1;
    auto body = [&](int64_t task) {
        Memory memory(cut);
        int64_t loaded = -1;
        const int64_t end = (task + 1) * of_task < count ? (task + 1) * of_task : count;
        for (int64_t i = task * of_task; i < end; ++i) {
            const int64_t sample = i / cut.units, first = i % cut.units * cut.unit;
            if (sample != loaded) memory.parameters.load(args, sample);
            loaded = sample;
            fn(memory, sample, i, first, first + cut.unit < cut.pixels ? first + cut.unit : cut.pixels);
        }
    };
    parallel_for((count + of_task - 1) / of_task, args.num_threads, body);
}

// 1 / max(norm, eps); NaN stays.
DIFFKERN_INLINE f32v reciprocal(f32v norm, float eps) {
    return 1.0f / (norm < eps ? broadcast(eps) : norm);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
