// The backward pass of linear_attention (docs/linear_attention.md). With p the softmax of q and w that of the keys,
//
//     dq = scale p (g - sum(p g))         g[d][n] = sum over e of context[d][e] dout[e][n], the sum over d
//     dcontext[d][e] = scale sum over n of p[d][n] dout[e][n]
//     dk = w (h - sum over e of dcontext[d][e] context[d][e])    h[d][n] = sum over e of dcontext[d][e] v[e][n]
//     dv[e][n] = sum over d of dcontext[d][e] w[d][n]
//
// where context and v stand less a center of each channel e, which cancels and leaves smaller numbers to round. Reads
// dout, q, k and v from memory once and writes dq, dk and dv: 28 bytes a channel and position in float32.
#include "cpu/linear_attention.h"
#include "cpu/linear_attention_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {
namespace {

// What the backward pass knows of a head: its squares have the rows of `Cut`.
struct Head {
    float* context;                        // [e][d], less the centers
    float* center;                         // [e]
    float *dcontext, *dcontext_of_values;  // [d][e] and [e][d]
    float* along;                          // [d]

    Head(float* memory, const Cut& cut)
        : context(memory),
          center(context + cut.square),
          dcontext(center + cut.rows),
          dcontext_of_values(dcontext + cut.square),
          along(dcontext_of_values + cut.square) {
    }
    static int64_t size(const Cut& cut) {
        return 3 * cut.square + 2 * cut.rows;
    }
};

// The mean of a channel's contexts, or 0 where it is not finite: a NaN of one key stays in that key's row.
void center(const LinearAttentionArgs& args, const Cut& cut, const Head& of, int64_t head) {
    const int64_t channels = cut.channels;
    const float* context = args.context + head * channels * channels;
    zero(of.context, Head::size(cut));
    for (int64_t e = 0; e < channels; ++e) {
        double total = 0;
        for (int64_t d = 0; d < channels; ++d) total += static_cast<double>(context[d * channels + e]);
        const float mean = static_cast<float>(total / static_cast<double>(channels));
        of.center[e] = std::isfinite(mean) ? mean : 0.0f;
        for (int64_t d = 0; d < channels; ++d) of.context[e * cut.rows + d] = context[d * channels + e] - of.center[e];
    }
}

struct Blocks {
    Scratch<float> memory;
    float *first, *second, *third, *fourth, *few;

    explicit Blocks(const Cut& cut)
        : memory(4 * cut.block_size() + few_positions(cut.channels)),
          first(memory),
          second(first + cut.block_size()),
          third(second + cut.block_size()),
          fourth(third + cut.block_size()),
          few(fourth + cut.block_size()) {
        zero_spare_rows(first, cut);
        zero_spare_rows(second, cut);
    }
};

// g becomes scale p (g - sum over the rows of p g).
inline void through_softmax(const float* p, float* g, int64_t rows, int64_t stride, int64_t width, float scale) {
    for (int64_t i = 0; i < width; i += kLanes) {
        f32v along = {};
        for (int64_t d = 0; d < rows; ++d) along += load(p + d * stride + i) * load(g + d * stride + i);
        for (int64_t d = 0; d < rows; ++d)
            store(g + d * stride + i, scale * load(p + d * stride + i) * (load(g + d * stride + i) - along));
    }
}

// dq of a unit, and its part of dcontext.
void queries(const LinearAttentionBackwardArgs& args, const Cut& cut, const Head& of, int64_t head, int64_t first,
             int64_t end, float* dcontext) {
    const LinearAttentionArgs& forward = args.forward;
    const int64_t sample = head / forward.shape.heads, of_sample = head % forward.shape.heads;
    Blocks blocks(cut);
    float *p = blocks.first, *dout = blocks.second, *g = blocks.third;
    zero(dcontext, cut.square);
    cut.for_each_block(first, end, [&](int64_t at, int64_t width) {
        const int64_t whole = whole_vectors(width);
        load_block(forward.q, sample, of_sample, cut.channels, at, width, p, cut.block);
        load_block(args.dout, sample, of_sample, cut.channels, at, width, dout, cut.block);
        softmax_over_rows(p, cut.channels, cut.block, whole, 1.0f);
        add_product_of_rows(p, dout, cut.rows, cut.block, whole, dcontext);
        product_over_rows(of.context, dout, cut.channels, cut.rows, cut.block, whole, g);
        through_softmax(p, g, cut.channels, cut.block, whole, forward.scale);
        store_block(g, cut.block, args.dq, sample, of_sample, cut.channels, at, width, blocks.few);
    });
}

// Joins the units' dcontext in order, both ways round, with the sums that dk needs.
void join(const LinearAttentionArgs& args, const Cut& cut, const Head& of, const float* partial) {
    for (int64_t u = 0; u < cut.units; ++u)
        for (int64_t i = 0; i < cut.square; ++i) of.dcontext[i] += partial[u * cut.square + i];
    for (int64_t d = 0; d < cut.channels; ++d) {
        float along = 0;
        for (int64_t e = 0; e < cut.channels; ++e) {
            const float value = args.scale * of.dcontext[d * cut.rows + e];
            of.dcontext[d * cut.rows + e] = of.dcontext_of_values[e * cut.rows + d] = value;
            along += value * of.context[e * cut.rows + d];
        }
        of.along[d] = along;
    }
}

struct Keys {
    HeadsView k, v, dk, dv;
};

void keys(const LinearAttentionArgs& args, const Cut& cut, const Head& of, const Keys& keys, int64_t head,
          int64_t first, int64_t end) {
    const int64_t sample = head / args.shape.heads, of_sample = head % args.shape.heads, stride = cut.block;
    Blocks blocks(cut);
    float *w = blocks.first, *v = blocks.second, *h = blocks.third, *dv = blocks.fourth;
    cut.for_each_block(first, end, [&](int64_t at, int64_t width) {
        const int64_t whole = whole_vectors(width);
        load_block(keys.k, sample, of_sample, cut.channels, at, width, w, stride);
        load_block(keys.v, sample, of_sample, cut.channels, at, width, v, stride);
        for (int64_t c = 0; c < cut.channels; ++c) {
            const float most = args.k_max[head * cut.channels + c], total = args.k_sum[head * cut.channels + c];
            for (int64_t i = 0; i < whole; i += kLanes) {
                store(w + c * stride + i, exp_of_difference(load(w + c * stride + i) - most) / total);
                store(v + c * stride + i, load(v + c * stride + i) - of.center[c]);
            }
        }
        product_over_rows(of.dcontext_of_values, v, cut.channels, cut.rows, stride, whole, h);
        product_over_rows(of.dcontext, w, cut.channels, cut.rows, stride, whole, dv);
        for (int64_t d = 0; d < cut.channels; ++d)
            for (int64_t i = 0; i < whole; i += kLanes)
                store(h + d * stride + i, load(w + d * stride + i) * (load(h + d * stride + i) - of.along[d]));
        store_block(h, stride, keys.dk, sample, of_sample, cut.channels, at, width, blocks.few);
        store_block(dv, stride, keys.dv, sample, of_sample, cut.channels, at, width, blocks.few);
    });
}

// The memory's gradients in each sample, (samples, 2, heads, channels, remembered), as blocks are stored.
Keys of_memory(const LinearAttentionArgs& args, float* gradients) {
    const LinearAttentionShape& shape = args.shape;
    const int64_t head = shape.channels * shape.remembered, half = shape.heads * head;
    const auto view = [&](float* data) {
        return HeadsView{reinterpret_cast<char*>(data), DType::f32, 2 * half, head, shape.remembered, 1};
    };
    return {args.memory_k, args.memory_v, view(gradients), view(gradients + half)};
}

}  // namespace

void linear_attention_backward(const LinearAttentionBackwardArgs& args) {
    const LinearAttentionArgs& forward = args.forward;
    const LinearAttentionShape& shape = forward.shape;
    const Cut cut(shape);
    const int64_t of_memory_size = 2 * shape.heads * shape.channels * shape.remembered;
    Scratch<float> partial(cut.heads * cut.units * cut.square), heads(cut.heads * Head::size(cut));
    Scratch<float> remembered(shape.samples * of_memory_size);
    const auto head_of = [&](int64_t head) { return Head(heads + head * Head::size(cut), cut); };
    const auto end_of = [&](int64_t first) {
        return first + cut.unit < shape.positions ? first + cut.unit : shape.positions;
    };
    for_each_unit(cut.heads, 1, forward.num_threads,
                  [&](int64_t head, int64_t) { center(forward, cut, head_of(head), head); });
    for_each_unit(cut.heads, cut.units, forward.num_threads, [&](int64_t head, int64_t unit) {
        queries(args, cut, head_of(head), head, unit * cut.unit, end_of(unit * cut.unit),
                partial + (head * cut.units + unit) * cut.square);
    });
    for_each_unit(cut.heads, 1, forward.num_threads, [&](int64_t head, int64_t) {
        join(forward, cut, head_of(head), partial + head * cut.units * cut.square);
    });
    for_each_unit(cut.heads, cut.joined, forward.num_threads, [&](int64_t head, int64_t unit) {
        const int64_t first = (unit - cut.of_memory) * cut.unit;
        if (unit < cut.of_memory)
            keys(forward, cut, head_of(head), of_memory(forward, remembered), head, 0, shape.remembered);
        else
            keys(forward, cut, head_of(head), {forward.k, forward.v, args.dk, args.dv}, head, first, end_of(first));
    });
    for (int64_t i = 0; i < of_memory_size; ++i) {
        double total = 0;
        for (int64_t n = 0; n < shape.samples; ++n) total += static_cast<double>(remembered[n * of_memory_size + i]);
        args.dmemory[i] = static_cast<float>(total);
    }
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
