// Softmax attention, forward: out = softmax(scale q k^T) v for every head. Reads q, k and v once, through their
// strides, and writes out; nothing of size T x K leaves the cache.
//
// k and v are packed into panels of float32; then for each block of queries and each kKeyBlock keys the products go to
// a tile that stays in the first-level cache, which becomes exp(product - maximum) in place and is multiplied by v
// (online softmax: Milakov and Gimelshein, arXiv:1805.02867; in blocks: Dao et al., arXiv:2205.14135). Bound by
// multiplications: 2 d and about 7 for the exponential for every query and key. A task is a head, or some blocks of its
// queries, and packs the head's k and v itself; where heads are fewer than threads, tasks of their own have packed them
// before. A query's result depends on nothing but its own row, so neither on tasks nor on threads.
#include "cpu/attention.h"

#include "cpu/attention_pack.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace diffkern {
namespace DIFFKERN_ISA {
namespace {

constexpr int64_t kKeyBlock = 128;  // the tile fills half of a first-level cache of 32 KB
static_assert(kKeyBlock % kRows == 0, "a block of keys is whole panels");
constexpr float kFar = 8388608.0f;  // 2^23, which rounding changes by no more than a half

struct Forward {
    int64_t keys, head_dim, channels;  // channels: head_dim in whole panels
    float scale, scale_log2;           // the scale, not negative: of e^x and of 2^x
    const float *packed_keys, *packed_values;
    float *queries{}, *out{}, *tile{};  // of the block
};

// A maximum to subtract: 0 for -inf, so that every weight is 0 where every score is -inf.
DIFFKERN_INLINE f32v finite(f32v maximum) {
    return maximum == -__builtin_inff() ? f32v{} : maximum;
}

// What rounding took from `shift`, maximum scale, where that is too much to be a factor of all weights; else 0. A score
// of 2^31 makes it 2^7 or more, of which the exponential is no number; infinities make NaN.
DIFFKERN_INLINE f32v far_rounding(f32v maximum, f32v scale, f32v shift) {
    const f32v far = multiply_subtract(finite(maximum), scale, shift);
    return shift < kFar && shift > -kFar ? f32v{} : far;
}

// scale (product - maximum), for shift = scale maximum: in one operation that rounds only the difference, or, without
// such, of the difference, which is rounded less than what it is of.
DIFFKERN_INLINE f32v scaled_difference(f32v product, f32v maximum, f32v scale, f32v shift) {
#ifdef __FP_FAST_FMAF
    (void)maximum;
    return multiply_subtract(product, scale, shift);
#else
    (void)shift;
    return (product - finite(maximum)) * scale;
#endif
}

// The tile's products become 2^(scale product - shift - rounding), and are added to `sums`.
template <int kVectors, bool kIsFar>
DIFFKERN_INLINE void weigh(float* tile, int64_t keys, f32v scale, const f32v* maximum, const f32v* shift,
                           const f32v* rounding, f32v* sums) {
    for (int64_t j = 0; j < keys; ++j)
        for (int v = 0; v < kVectors; ++v, tile += kLanes) {
            f32v difference = scaled_difference(load(tile), maximum[v], scale, shift[v]);
            if (kIsFar) difference -= rounding[v];
            const f32v weight = exp2(difference);
            sums[v] += weight;
            store(tile, weight);
        }
}

// The block of queries that is packed in f.queries: leaves the weighted sums, divided, in f.out, [channel][lane], and
// ln of the sum of exponentials as the sum of `most`, the largest score, and `rest`. The scale is applied where the
// maximum is subtracted, in one operation that rounds only the difference.
template <int kVectors>
void attend(const Forward& f, float* most, float* rest) {
    constexpr int kWidth = kVectors * kLanes;
    const f32v lowest = broadcast(-__builtin_inff()), scale = broadcast(f.scale_log2);
    f32v maximum[kVectors], sum[kVectors] = {};
    f32v shift[kVectors] = {}, rounding[kVectors] = {};  // the maximum, scaled, is their sum, or nearly the shift alone
    for (int v = 0; v < kVectors; ++v) maximum[v] = lowest;
    for (int64_t first = 0; first < f.keys; first += kKeyBlock) {
        const int64_t count = f.keys - first < kKeyBlock ? f.keys - first : kKeyBlock;
        f32v before[kVectors], factor[kVectors], part[kVectors] = {};
        bool far = false;
        for (int v = 0; v < kVectors; ++v) before[v] = maximum[v];
        scores<kVectors, true>(f.packed_keys + first * f.head_dim, f.queries, count, f.head_dim, f.tile, maximum);
        for (int v = 0; v < kVectors; ++v) {
            const f32v shift_before = shift[v], rounding_before = rounding[v];
            shift[v] = finite(maximum[v]) * scale;
            rounding[v] = far_rounding(maximum[v], scale, shift[v]);
#ifdef __FP_FAST_FMAF
            const f32v less = (shift_before - shift[v]) + (rounding_before - rounding[v]);
#else
            const f32v less = (before[v] - finite(maximum[v])) * scale + (rounding_before - rounding[v]);
            (void)shift_before;
#endif
            factor[v] = exp2(before[v] == lowest ? lowest : less);
            far = far || any(rounding[v] != f32v{});
        }
        if (far)
            weigh<kVectors, true>(f.tile, count, scale, maximum, shift, rounding, part);
        else
            weigh<kVectors, false>(f.tile, count, scale, maximum, shift, rounding, part);
        for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] * factor[v] + part[v];
        for (int64_t c = 0; c < f.channels; c += kRows)
            accumulate<kVectors>(f.tile, f.packed_values + c * f.keys + first * kRows, count, first ? factor : nullptr,
                                 f.out + c * kWidth);
    }
    for (int v = 0; v < kVectors; ++v) {
        const f32v reciprocal = 1.0f / (sum[v] == 0.0f ? broadcast(1.0f) : sum[v]);
        for (int64_t c = 0; c < f.channels; ++c) {
            float* at = f.out + c * kWidth + v * kLanes;
            store(at, load(at) * reciprocal);
        }
        const f32v neglected = multiply_subtract(finite(maximum[v]), scale, shift[v]) - rounding[v];
        const f32v largest = finite(maximum[v]) * f.scale;
        const f32v rounding_of_it = multiply_subtract(finite(maximum[v]), broadcast(f.scale), largest);
        const f32v logarithm = log1p_positive(sum[v] - 1.0f) - neglected * kLn2;
        store(most + v * kLanes, maximum[v] == lowest ? lowest : largest);
        store(rest + v * kLanes, maximum[v] == lowest ? f32v{} : logarithm + rounding_of_it);
    }
}

// The panels of heads, one behind the other.
struct Panels {
    int64_t key_floats, value_floats;  // of a head
    float *keys{}, *values{};

    explicit Panels(const AttentionArgs& args)
        : key_floats(round_up(args.keys, kRows) * args.head_dim),
          value_floats(args.keys * round_up(args.head_dim, kRows)) {
    }
    Panels of(int64_t head) const {
        Panels panels = *this;
        panels.keys += head * key_floats;
        panels.values += head * value_floats;
        return panels;
    }
};

// Keys `first` to `end` of a head. `first` is a multiple of kRows.
template <class T>
void pack_keys(const AttentionArgs& args, int64_t head, int64_t first, int64_t end, const Panels& panels) {
    const Head<const T> k(args.k, head / args.heads, head % args.heads);
    pack(k.data + first * k.row_stride, end - first, k.row_stride, args.head_dim, k.channel_stride, 1.0f, kRows,
         panels.keys + first * args.head_dim);
}

// Channels `first` to `end` of the values of a head. `first` is a multiple of kRows.
template <class T>
void pack_values(const AttentionArgs& args, int64_t head, int64_t first, int64_t end, const Panels& panels) {
    const Head<const T> v(args.v, head / args.heads, head % args.heads);
    pack(v.data + first * v.channel_stride, end - first, v.channel_stride, args.keys, v.row_stride, 1.0f, kRows,
         panels.values + first * args.keys);
}

// Queries `first` to `end` of a head.
template <class T>
void run(const AttentionArgs& args, int64_t head, int64_t first, int64_t end, const Panels& panels) {
    const int64_t batch = head / args.heads, h = head % args.heads, d = args.head_dim;
    const Head<const T> q(args.q, batch, h);
    const Head<T> out(args.out, batch, h);
    const auto size = static_cast<float>(args.scale < 0 ? -args.scale : args.scale);
    const auto size_log2 = static_cast<float>(static_cast<double>(size) * kLog2E);
    Forward f{args.keys, d, round_up(d, kRows), size, size_log2, panels.keys, panels.values};
    Arena arena({{&f.queries, kBlock * d}, {&f.out, kBlock * f.channels}, {&f.tile, kBlock * kKeyBlock}});
    const float sign = args.scale < 0 ? -1.0f : 1.0f;
    for (int64_t t = first; t < end;) {
        const int64_t count = end - t < kBlock ? end - t : kBlock;
        const bool narrow = count <= kLanes;
        const int64_t width = narrow ? kLanes : kBlock;
        float most[kBlock], rest[kBlock];
        pack(q.data + t * q.row_stride, count, q.row_stride, d, q.channel_stride, sign, width, f.queries);
        narrow ? attend<1>(f, most, rest) : attend<kMostVectors>(f, most, rest);
        unpack(f.out, width, d, count, out.data + t * out.row_stride, out.channel_stride, out.row_stride);
        if (args.lse)
            for (int64_t i = 0; i < count; ++i) {
                float* lse = args.lse + head * args.queries + t + i;
                lse[0] = most[i];
                lse[args.batch * args.heads * args.queries] = rest[i];
            }
        t += count;
    }
}

// Queries of a task: tasks enough that threads finish together, but of no fewer than so many blocks of a head.
int64_t queries_of_task(const AttentionArgs& args, int64_t fewest_blocks) {
    const int64_t blocks = groups_of(kBlock, args.queries), most = groups_of(fewest_blocks, blocks);
    const int64_t wanted = args.num_threads == 1 ? 1 : groups_of(args.batch * args.heads, 4 * args.num_threads);
    return groups_of(least(wanted, most), blocks) * kBlock;
}

// Every task packs its head: so of no fewer than two blocks.
template <class T>
void each_packs(const AttentionArgs& args) {
    const int64_t queries = queries_of_task(args, 2), tasks = groups_of(queries, args.queries);
    auto body = [&](int64_t task) {
        const int64_t head = task / tasks, first = task % tasks * queries;
        Panels panels(args);
        Arena arena({{&panels.keys, panels.key_floats}, {&panels.values, panels.value_floats}});
        pack_keys<T>(args, head, 0, args.keys, panels);
        pack_values<T>(args, head, 0, args.head_dim, panels);
        run<T>(args, head, first, least(first + queries, args.queries), panels);
    };
    parallel_for(args.batch * args.heads * tasks, args.num_threads, body);
}

// Threads pack strips of all heads, then read each other's.
template <class T>
void all_pack(const AttentionArgs& args) {
    constexpr int64_t kStrip = kTogether;  // keys, or channels of the values
    static_assert(kStrip % kRows == 0, "a strip is whole panels");
    const int64_t heads = args.batch * args.heads;
    Panels panels(args);
    Arena arena({{&panels.keys, heads * panels.key_floats}, {&panels.values, heads * panels.value_floats}});
    const int64_t key_strips = groups_of(kStrip, args.keys), strips = key_strips + groups_of(kStrip, args.head_dim);
    auto pack_strip = [&](int64_t task) {
        const int64_t head = task / strips, strip = task % strips;
        if (strip < key_strips) {
            const int64_t first = strip * kStrip;
            pack_keys<T>(args, head, first, least(first + kStrip, args.keys), panels.of(head));
        } else {
            const int64_t first = (strip - key_strips) * kStrip;
            pack_values<T>(args, head, first, least(first + kStrip, args.head_dim), panels.of(head));
        }
    };
    parallel_for(heads * strips, args.num_threads, pack_strip);

    const int64_t queries = queries_of_task(args, 1), tasks = groups_of(queries, args.queries);
    auto body = [&](int64_t task) {
        const int64_t head = task / tasks, first = task % tasks * queries;
        run<T>(args, head, first, least(first + queries, args.queries), panels.of(head));
    };
    parallel_for(heads * tasks, args.num_threads, body);
}

template <class T>
void forward(const AttentionArgs& args) {
    const bool few = args.batch * args.heads < args.num_threads && args.queries > kBlock;
    few ? all_pack<T>(args) : each_packs<T>(args);
}

}  // namespace

void attention(const AttentionArgs& args) {
    switch (args.dtype) {
        case DType::bf16: return forward<bf16>(args);
        case DType::f16: return forward<f16>(args);
        default: return forward<float>(args);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
