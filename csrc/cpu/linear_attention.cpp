// Linear attention with memory keys, three times in parallel: sums over the keys of a unit, joined for each head, and
// the result. Reads k, v and q from memory once and writes the result once: 16 bytes a channel and position in float32.
// A unit's sums belong to the largest key that it has seen; when a larger one comes, they are rescaled.
#include "cpu/linear_attention.h"

#include "cpu/linear_attention_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {
namespace {

constexpr float kLeast = -__builtin_inff();

// What a unit knows of its keys and values, one after the other in memory.
struct Sums {
    float *context, *most, *total;  // (rows, rows), (rows,) twice

    Sums(float* memory, const Cut& cut)
        : context(memory), most(memory + cut.square), total(memory + cut.square + whole_vectors(cut.rows)) {
    }
    static int64_t size(const Cut& cut) {
        return cut.square + 2 * whole_vectors(cut.rows);
    }
};

// A block of one channel's keys becomes its weights beside the largest key so far.
inline void weigh(float* k, int64_t width, float* context, int64_t rows, float& most, float& total) {
    const int64_t whole = whole_vectors(width);
    for (int64_t i = width; i < whole; ++i) k[i] = kLeast;
    f32v found = broadcast(most);
    for (int64_t i = 0; i < whole; i += kLanes) found = larger(load(k + i), found);
    const float now = largest(found);
    if (now > most) {
        const float factor = exp_of_difference(broadcast(most - now))[0];
        for (int64_t e = 0; e < rows; ++e) context[e] *= factor;
        total *= factor;
        most = now;
    }
    const float finite = most == kLeast ? 0.0f : most;  // so that keys of -inf have a weight of 0 here
    f32v sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
        const f32v weight = exp_of_difference(load(k + i) - finite);
        store(k + i, weight);
        sums += weight;
    }
    total += sum(sums);
}

void sum_keys(const Cut& cut, const HeadsView& k, const HeadsView& v, int64_t sample, int64_t head, int64_t first,
              int64_t end, Sums sums) {
    Scratch<float> memory(2 * cut.block_size());
    float *keys = memory, *values = memory + cut.block_size();
    zero_spare_rows(keys, cut);
    zero_spare_rows(values, cut);
    zero(sums.context, Sums::size(cut));
    for (int64_t c = 0; c < cut.channels; ++c) sums.most[c] = kLeast;
    cut.for_each_block(first, end, [&](int64_t at, int64_t width) {
        load_block(k, sample, head, cut.channels, at, width, keys, cut.block);
        load_block(v, sample, head, cut.channels, at, width, values, cut.block);
        for (int64_t c = 0; c < cut.channels; ++c)
            weigh(keys + c * cut.block, width, sums.context + c * cut.rows, cut.rows, sums.most[c], sums.total[c]);
        add_product_of_rows(keys, values, cut.rows, cut.block, whole_vectors(width), sums.context);
    });
}

// Joins the units of a head, in order, and leaves what the backward pass reads.
void join(const LinearAttentionArgs& args, const Cut& cut, float* partial, int64_t head) {
    const int64_t channels = cut.channels;
    float* context = args.context + head * channels * channels;
    for (int64_t c = 0; c < channels; ++c) {
        float most = kLeast, total = 0;
        for (int64_t u = 0; u < cut.joined; ++u) {
            const float of_unit = Sums(partial + u * Sums::size(cut), cut).most[c];
            most = of_unit > most ? of_unit : most;
        }
        float* row = context + c * channels;
        zero(row, channels);
        for (int64_t u = 0; u < cut.joined; ++u) {
            const Sums unit(partial + u * Sums::size(cut), cut);
            const float factor = exp_of_difference(broadcast(unit.most[c] - most))[0];
            total += unit.total[c] * factor;
            for (int64_t e = 0; e < channels; ++e) row[e] += unit.context[c * cut.rows + e] * factor;
        }
        for (int64_t e = 0; e < channels; ++e) row[e] /= total;
        args.k_max[head * channels + c] = most;
        args.k_sum[head * channels + c] = total;
    }
}

void attend(const LinearAttentionArgs& args, const Cut& cut, int64_t head, int64_t first, int64_t end) {
    const int64_t sample = head / args.shape.heads, of_sample = head % args.shape.heads, size = cut.block_size();
    Scratch<float> memory(cut.square + 2 * size + few_positions(cut.channels));
    float *context = memory, *queries = context + cut.square, *out = queries + size, *few = out + size;
    zero(context, cut.square);
    for (int64_t c = 0; c < cut.channels; ++c)
        for (int64_t e = 0; e < cut.channels; ++e)
            context[c * cut.rows + e] = args.context[(head * cut.channels + c) * cut.channels + e];
    cut.for_each_block(first, end, [&](int64_t at, int64_t width) {
        const int64_t whole = whole_vectors(width);
        load_block(args.q, sample, of_sample, cut.channels, at, width, queries, cut.block);
        softmax_over_rows(queries, cut.channels, cut.block, whole, args.scale);
        product_over_rows(context, queries, cut.channels, cut.rows, cut.block, whole, out);
        store_block(out, cut.block, args.out, sample, of_sample, cut.channels, at, width, few);
    });
}

}  // namespace

void linear_attention(const LinearAttentionArgs& args) {
    const Cut cut(args.shape);
    const int64_t size = Sums::size(cut);
    Scratch<float> partial(cut.heads * cut.joined * size);
    const auto end_of = [&](int64_t first) {
        return first + cut.unit < args.shape.positions ? first + cut.unit : args.shape.positions;
    };
    for_each_unit(cut.heads, cut.joined, args.num_threads, [&](int64_t head, int64_t unit) {
        const int64_t sample = head / args.shape.heads, of_sample = head % args.shape.heads;
        const Sums sums(partial + (head * cut.joined + unit) * size, cut);
        const int64_t first = (unit - cut.of_memory) * cut.unit;
        if (unit < cut.of_memory)
            sum_keys(cut, args.memory_k, args.memory_v, sample, of_sample, 0, args.shape.remembered, sums);
        else
            sum_keys(cut, args.k, args.v, sample, of_sample, first, end_of(first), sums);
    });
    for_each_unit(cut.heads, 1, args.num_threads,
                  [&](int64_t head, int64_t) { join(args, cut, partial + head * cut.joined * size, head); });
    for_each_unit(cut.heads, cut.units, args.num_threads, [&](int64_t head, int64_t unit) {
        attend(args, cut, head, unit * cut.unit, end_of(unit * cut.unit));
    });
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
