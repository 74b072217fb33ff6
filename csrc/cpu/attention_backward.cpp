// Softmax attention, backward (docs/attention.md). With P the softmax's weights, computed again from the scores and
// the rows' log-sum-exp,
//
//     dV = P^T dO      dP = dO V^T      dS = P (dP - sum over the channels of dO O)
//     dQ = scale dS K      dK = scale dS^T Q
//
// (Dao et al., arXiv:2205.14135, B.4). As the rows of dS sum to nothing, dQ is made of keys less their mean: else what
// keys have in common would multiply what rounding leaves of those sums. A task is a head; nothing of size T x K leaves
// the cache. Tiles are as in the forward pass: a block of queries in lanes by kKeyBlock keys. Five products of a tile
// where the forward pass has two, bound by multiplications. Every sum runs in one fixed order.
#include "cpu/attention_gradient.h"
#include "cpu/attention_pack.h"
#include "cpu/parallel.h"

namespace diffkern {
namespace DIFFKERN_ISA {
namespace {

constexpr int64_t kKeyBlock = 64;  // two tiles fill half of a first-level cache of 32 KB
static_assert(kKeyBlock % 8 == 0, "a block of keys is whole panels");

struct Backward {
    int64_t keys, head_dim;
    int64_t keys_up, channels, wide;  // the keys and head_dim in whole panels; head_dim in whole rows of lanes
    float scale;
    float *keys_by_key{}, *values_by_key{}, *keys_by_channel{};  // panels of k, v and k
    float *dk{}, *dv{};                                          // [key][channel]
    float *queries{}, *dout{}, *dq{};                            // of the block, [channel][lane]
    float *query_rows{}, *dout_rows{};                           // of the block, [query][channel]
    float *weights{}, *dscores{};                                // tiles [key][lane]
};

// The log-sum-exp of a vector of queries, in two parts.
struct LogSumExp {
    float most[kBlock] = {}, rest[kBlock] = {};
};

// The tile of products becomes that of the softmax's weights, and dP dS. The largest score is subtracted first, in one
// operation: what is left of a score and of the log-sum-exp is small where the weight is not.
template <int kVectors>
DIFFKERN_INLINE void weigh(const Backward& b, int64_t keys, const LogSumExp& lse, const float* sums) {
    for (int64_t j = 0; j < keys; ++j)
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = (j * kVectors + v) * kLanes;
            const f32v below = multiply_subtract(load(b.weights + at), broadcast(b.scale), load(lse.most + v * kLanes));
            const f32v weight = exp2((below - load(lse.rest + v * kLanes)) * static_cast<float>(kLog2E));
            store(b.weights + at, weight);
            store(b.dscores + at, weight * (load(b.dscores + at) - load(sums + v * kLanes)));
        }
}

// One block of `queries` queries, given its log-sum-exp and its sums of dO O.
template <int kVectors>
void differentiate(const Backward& b, int64_t queries, const LogSumExp& lse, const float* sums) {
    constexpr int kWidth = kVectors * kLanes;
    f32v one[kVectors];
    for (int v = 0; v < kVectors; ++v) one[v] = broadcast(1.0f);
    for (int64_t first = 0; first < b.keys; first += kKeyBlock) {
        const int64_t count = b.keys - first < kKeyBlock ? b.keys - first : kKeyBlock, whole = round_up(count, kRows);
        products<kVectors>(b.keys_by_key + first * b.head_dim, b.queries, whole, b.head_dim, b.weights);
        products<kVectors>(b.values_by_key + first * b.head_dim, b.dout, whole, b.head_dim, b.dscores);
        weigh<kVectors>(b, whole, lse, sums);
        for (int64_t c = 0; c < b.channels; c += kRows)
            accumulate<kVectors>(b.dscores, b.keys_by_channel + c * b.keys + first * kRows, count,
                                 first ? one : nullptr, b.dq + c * kWidth);
        accumulate_gradient(b.weights, kWidth, whole, queries, b.dout_rows, b.wide, b.dv + first * b.wide);
        accumulate_gradient(b.dscores, kWidth, whole, queries, b.query_rows, b.wide, b.dk + first * b.wide);
    }
}

// The sums over the channels of dO O, per lane: in four parts, each rounded less than one long sum.
void sums_along(const float* dout, const float* out, int64_t channels, int64_t width, float* sums) {
    for (int64_t i = 0; i < width; i += kLanes) {
        f32v total[4] = {};
        for (int64_t c = 0; c < channels; ++c) total[c % 4] += load(dout + c * width + i) * load(out + c * width + i);
        store(sums + i, (total[0] + total[1]) + (total[2] + total[3]));
    }
}

// Panels of channels, [channel / kRows][key][kRows], each channel less its mean over the keys.
void subtract_means(float* panels, int64_t channels, int64_t keys) {
    for (float* end = panels + channels * keys; panels < end; panels += keys * kRows) {
        float mean[kRows] = {};
        for (int64_t j = 0; j < keys; ++j)
            for (int i = 0; i < kRows; ++i) mean[i] += panels[j * kRows + i];
        for (int i = 0; i < kRows; ++i) mean[i] /= static_cast<float>(keys);
        for (int64_t j = 0; j < keys; ++j)
            for (int i = 0; i < kRows; ++i) panels[j * kRows + i] -= mean[i];
    }
}

void scale_by(float factor, float* values, int64_t count) {
    for_lanes(0, count,
              [&](int64_t i, int n) DIFFKERN_LAMBDA { store_n(values + i, load_n(values + i, n) * factor, n); });
}

template <class T>
void run(const AttentionBackwardArgs& backward, int64_t head) {
    const AttentionArgs& args = backward.forward;
    const int64_t batch = head / args.heads, h = head % args.heads, d = args.head_dim;
    const Head<const T> q(args.q, batch, h), k(args.k, batch, h), v(args.v, batch, h), out(args.out, batch, h),
        dout(backward.dout, batch, h);
    const Head<T> dq(backward.dq, batch, h), dk(backward.dk, batch, h), dv(backward.dv, batch, h);
    const auto scale = static_cast<float>(args.scale);
    Backward b{args.keys, d, round_up(args.keys, kRows), round_up(d, kRows), round_up(d, kChannelLanes), scale};
    Arena arena({{&b.keys_by_key, b.keys_up * d},
                 {&b.values_by_key, b.keys_up * d},
                 {&b.keys_by_channel, b.keys * b.channels},
                 {&b.dk, b.keys_up * b.wide},
                 {&b.dv, b.keys_up * b.wide},
                 {&b.queries, kBlock * d},
                 {&b.dout, kBlock * d},
                 {&b.dq, kBlock * b.channels},
                 {&b.query_rows, kBlock * b.wide},
                 {&b.dout_rows, kBlock * b.wide},
                 {&b.weights, kBlock * kKeyBlock},
                 {&b.dscores, kBlock * kKeyBlock}});

    pack(k.data, args.keys, k.row_stride, d, k.channel_stride, 1.0f, kRows, b.keys_by_key);
    pack(v.data, args.keys, v.row_stride, d, v.channel_stride, 1.0f, kRows, b.values_by_key);
    pack(k.data, d, k.channel_stride, args.keys, k.row_stride, 1.0f, kRows, b.keys_by_channel);
    subtract_means(b.keys_by_channel, b.channels, args.keys);
    for (int64_t i = 0; i < b.keys_up * b.wide; ++i) b.dk[i] = b.dv[i] = 0.0f;
    for (int64_t t = 0; t < args.queries; t += kBlock) {
        const int64_t count = args.queries - t < kBlock ? args.queries - t : kBlock;
        const int64_t width = count <= kLanes ? kLanes : kBlock;
        const T *queries = q.data + t * q.row_stride, *gradient = dout.data + t * dout.row_stride;
        float sums[kBlock];
        LogSumExp lse;
        for (int64_t i = 0; i < count; ++i) {
            const float* value = args.lse + head * args.queries + t + i;
            lse.most[i] = *value == -__builtin_inff() ? 0.0f : *value;  // every weight is 0
            lse.rest[i] = value[args.batch * args.heads * args.queries];
        }
        pack(out.data + t * out.row_stride, count, out.row_stride, d, out.channel_stride, 1.0f, width, b.dq);
        pack(gradient, count, dout.row_stride, d, dout.channel_stride, 1.0f, width, b.dout);
        sums_along(b.dout, b.dq, d, width, sums);
        pack(queries, count, q.row_stride, d, q.channel_stride, 1.0f, width, b.queries);
        pack(queries, d, q.channel_stride, count, q.row_stride, 1.0f, b.wide, b.query_rows);
        pack(gradient, d, dout.channel_stride, count, dout.row_stride, 1.0f, b.wide, b.dout_rows);
        width == kLanes ? differentiate<1>(b, count, lse, sums) : differentiate<kMostVectors>(b, count, lse, sums);
        scale_by(scale, b.dq, d * width);
        unpack(b.dq, width, d, count, dq.data + t * dq.row_stride, dq.channel_stride, dq.row_stride);
    }
    scale_by(scale, b.dk, args.keys * b.wide);
    unpack(b.dk, b.wide, args.keys, d, dk.data, dk.row_stride, dk.channel_stride);
    unpack(b.dv, b.wide, args.keys, d, dv.data, dv.row_stride, dv.channel_stride);
}

template <class T>
void backward(const AttentionBackwardArgs& args) {
    auto body = [&](int64_t head) { run<T>(args, head); };
    parallel_for(args.forward.batch * args.forward.heads, args.forward.num_threads, body);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
    switch (args.forward.dtype) {
        case DType::bf16: return backward<bf16>(args);
        case DType::f16: return backward<f16>(args);
        default: return backward<float>(args);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
