// GroupNorm with the scale-shift form and SiLU in the same affine, forward and backward; the two memory formats are in
// group_norm_contiguous.h and group_norm_channels_last.h, the derivation of the backward pass in docs/group_norm.md.
#include "cpu/group_norm.h"

#include "cpu/group_norm_channels_last.h"
#include "cpu/group_norm_channels_last_backward.h"
#include "cpu/group_norm_contiguous.h"
#include "cpu/group_norm_contiguous_backward.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class T, bool kSilu>
static void forward(const GroupNormArgs& args) {
    if (!args.shape.channels_last)
        return for_each_slab(args,
                             [&](const Slab& first, int64_t count) { slabs_forward<T, kSilu>(args, first, count); });
    for_each_sample(
        args.shape, args.num_threads, [](int64_t, ChannelSums&) {},
        [&](int64_t sample, int64_t chunk, ChannelSums& sums) { chunk_moments<T>(args, sample, chunk, sums); },
        [&](int64_t sample, ChannelSums& sums) { sample_affine(args, sample, sums); },
        [&](int64_t sample, int64_t chunk, ChannelSums& sums) { chunk_apply<T, kSilu>(args, sample, chunk, sums); });
}

template <class T, bool kSilu, bool kOffset>
static void backward(const GroupNormBackwardArgs& args) {
    if (!args.forward.shape.channels_last)
        return for_each_slab(args.forward, [&](const Slab& first, int64_t count) {
            const int64_t channels = args.forward.shape.channels / args.forward.num_groups;
            for (int64_t k = 0; k < count; ++k) slab_backward<T, kSilu, kOffset>(args, next(first, k, channels));
        });
    for_each_sample(
        args.forward.shape, args.forward.num_threads,
        [&](int64_t sample, ChannelSums& sums) { sample_parameters(args.forward, sample, sums); },
        [&](int64_t sample, int64_t chunk, ChannelSums& sums) {
            chunk_gradient_sums<T, kSilu, kOffset>(args, sample, chunk, sums);
        },
        [&](int64_t sample, ChannelSums& sums) { sample_gradient_means(args, sample, sums); },
        [&](int64_t sample, int64_t chunk, ChannelSums& sums) { chunk_dx<T, kSilu>(args, sample, chunk, sums); });
}

template <class T>
static void forward(const GroupNormArgs& args) {
    args.silu ? forward<T, true>(args) : forward<T, false>(args);
}

template <class T, bool kSilu>
static void backward(const GroupNormBackwardArgs& args) {
    args.doffset ? backward<T, kSilu, true>(args) : backward<T, kSilu, false>(args);
}

template <class T>
static void backward(const GroupNormBackwardArgs& args) {
    args.forward.silu ? backward<T, true>(args) : backward<T, false>(args);
}

void group_norm(const GroupNormArgs& args) {
    switch (args.dtype) {
        case DType::bf16: return forward<bf16>(args);
        case DType::f16: return forward<f16>(args);
        default: return forward<float>(args);
    }
}

void group_norm_backward(const GroupNormBackwardArgs& args) {
    switch (args.forward.dtype) {
        case DType::bf16: return backward<bf16>(args);
        case DType::f16: return backward<f16>(args);
        default: return backward<float>(args);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
