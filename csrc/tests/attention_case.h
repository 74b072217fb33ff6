// A call of attention, forward and backward, with memory of exact size, and the softmax in double with a bound on what
// the kernel's may be off by.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/attention.h"
#include "tests/bounded.h"
#include "tests/buffer.h"

namespace diffkern::tests {

struct AttentionSize {
    int64_t batch, heads, queries, keys, head_dim;
};

// Channels side by side, rows side by side, or channels two apart and rows beside those (a third of a packed tensor).
enum class HeadLayout { rows, planes, interleaved };
constexpr HeadLayout kHeadLayouts[] = {HeadLayout::rows, HeadLayout::planes, HeadLayout::interleaved};

// A tensor (B, H, rows, d) that ends with its last element. What lies between its elements is NaN.
struct HeadsBuffer {
    int64_t batch, heads, rows, channels;
    AttentionView view;
    Buffer buffer;

    HeadsBuffer(HeadLayout layout, DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t channels,
                int64_t offset)
        : batch(batch),
          heads(heads),
          rows(rows),
          channels(channels),
          view(strides(layout, heads, rows, channels)),
          buffer(dtype, at(batch - 1, heads - 1, rows - 1, channels - 1) + 1, offset) {
        view.data = buffer.data();
    }
    HeadsBuffer(const HeadsBuffer&) = delete;

    int64_t at(int64_t b, int64_t h, int64_t row, int64_t channel) const {
        return b * view.batch_stride + h * view.head_stride + row * view.row_stride + channel * view.channel_stride;
    }
    double get(int64_t b, int64_t h, int64_t row, int64_t channel) const {
        return buffer.get(at(b, h, row, channel));
    }
    template <class Fn>
    void for_each(Fn fn) const {
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t c = 0; c < channels; ++c) fn(at(b, h, r, c));
    }
    void fill(Random& random, double size) {
        for_each([&](int64_t i) { buffer.set(i, random.real(-size, size)); });
    }
    // How many numbers of the whole memory are not NaN: the elements, if all were written and nothing else was.
    int64_t numbers() const {
        int64_t count = 0;
        for (int64_t i = 0; i < buffer.count(); ++i) count += !std::isnan(buffer.get(i));
        return count;
    }
    int64_t elements() const {
        return batch * heads * rows * channels;
    }

 private:
    static AttentionView strides(HeadLayout layout, int64_t heads, int64_t rows, int64_t channels) {
        switch (layout) {
            case HeadLayout::rows: return {nullptr, heads * rows * channels, channels, heads * channels, 1};
            case HeadLayout::planes: return {nullptr, heads * rows * channels, rows * channels, 1, rows};
            default: return {nullptr, 2 * heads * rows * channels, 2 * channels, 2 * heads * channels, 2};
        }
    }
};

struct AttentionCase {
    AttentionSize size;
    DType dtype;
    double scale;
    HeadsBuffer q, k, v, out, dout, dq, dk, dv;
    Buffer lse;

    AttentionCase(const AttentionSize& size, HeadLayout layout, DType dtype, Random& random)
        : size(size),
          dtype(dtype),
          scale(random.below(4) == 0 ? -0.7 : 1.3 / std::sqrt(static_cast<double>(size.head_dim))),
          q(make(layout, size.queries, random)),
          k(make(layout, size.keys, random)),
          v(make(kHeadLayouts[random.below(3)], size.keys, random)),
          out(make(layout, size.queries, random)),
          dout(make(kHeadLayouts[random.below(3)], size.queries, random)),
          dq(make(layout, size.queries, random)),
          dk(make(layout, size.keys, random)),
          dv(make(layout, size.keys, random)),
          lse(DType::f32, 2 * size.batch * size.heads * size.queries) {
        q.fill(random, 2);
        k.fill(random, 2);
        v.fill(random, 1);
        dout.fill(random, 1);
    }

    AttentionArgs forward_args(int num_threads) const {
        return {size.batch, size.heads, size.queries, size.keys,       size.head_dim, dtype,      q.view,
                k.view,     v.view,     out.view,     lse.as<float>(), scale,         num_threads};
    }
    AttentionBackwardArgs backward_args(int num_threads) const {
        return {forward_args(num_threads), dout.view, dq.view, dk.view, dv.view};
    }
    double log_sum_exp(int64_t row) const {
        return lse.get(row) + lse.get(size.batch * size.heads * size.queries + row);
    }
    void set_log_sum_exp(int64_t row, double most, double rest) {
        lse.set(row, most);
        lse.set(size.batch * size.heads * size.queries + row, rest);
    }
    std::string describe() const {
        return text("B ", size.batch, ", H ", size.heads, ", T ", size.queries, ", K ", size.keys, ", d ",
                    size.head_dim, ", ", name_of(dtype), ", channel stride ", q.view.channel_stride, ", scale ", scale);
    }
    void check(double actual, double expected, double error, DType stored, const char* name) const {
        CHECK(Bounded(expected, error, kFloat).allows(actual, stored), name, ": ", actual, " for ", expected, " +- ",
              error, ", ", describe());
    }

 private:
    HeadsBuffer make(HeadLayout layout, int64_t rows, Random& random) const {
        return {layout, dtype, size.batch, size.heads, rows, size.head_dim, random.below(2)};
    }
};

// Half a unit in the last place of float32. The portable path rounds products and sums apart, so a multiply-add is
// twice this.
constexpr double kHalfUlp = 0x1p-24;

// How far a sum of products may be off: twice per term and a few times more, of the sum of the sizes.
inline double sum_error(int64_t terms, double sizes) {
    return kHalfUlp * static_cast<double>(2 * terms + 8) * sizes;
}

struct Product {
    double value = 0, size = 0;  // the sum, and that of its terms' sizes

    void add(double a, double b) {
        value += a * b;
        size += std::fabs(a * b);
    }
    double error(int64_t terms) const {
        return sum_error(terms, size);
    }
};

// Of rows of two tensors.
inline Product product(const HeadsBuffer& a, int64_t row, const HeadsBuffer& b, int64_t other, int64_t n, int64_t h) {
    Product sum;
    for (int64_t c = 0; c < a.channels; ++c) sum.add(a.get(n, h, row, c), b.get(n, h, other, c));
    return sum;
}

// The scaled scores of a query, and how far each may be off in the kernel.
struct Scores {
    std::vector<double> value, error;

    Scores(const AttentionCase& attention, int64_t n, int64_t h, int64_t query) {
        for (int64_t key = 0; key < attention.size.keys; ++key) {
            const Product of = product(attention.q, query, attention.k, key, n, h);
            value.push_back(attention.scale * of.value);
            error.push_back(std::fabs(attention.scale) * of.error(attention.size.head_dim));
        }
    }
};

}  // namespace diffkern::tests
