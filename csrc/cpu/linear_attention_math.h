// What the forward and the backward kernels of linear_attention share: how positions are cut, two softmaxes and two
// products of blocks.
//
// A block is some positions of one head, its rows the channels: 32 KiB in float32 for heads of 32 channels, so that two
// fit the second-level cache and the rows that a product works on the first. A unit of work is some blocks of one head
// of one sample; there are no more than kUnits of a head, and which positions make one depends on the shape alone. What
// units sum up is joined in their order, so results do not depend on threads.
#pragma once

#include "cpu/heads_block.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr int64_t kUnits = 16;

struct Cut {
    int64_t channels, rows;            // of a head, and in fours
    int64_t block, unit;               // positions
    int64_t units, of_memory, joined;  // of a head: in its positions, in the memory (0 or 1), in both
    int64_t heads;                     // of all samples
    int64_t square;                    // rows of a head's product with another's

    explicit Cut(const LinearAttentionShape& shape)
        : channels(shape.channels), rows(whole_fours(shape.channels)), heads(shape.samples * shape.heads) {
        block = 8192 / channels / 64 * 64;
        if (block < 64) block = 64;
        if (block > 512) block = 512;
        const int64_t blocks = (shape.positions + block - 1) / block;
        unit = (blocks + kUnits - 1) / kUnits * block;
        units = (shape.positions + unit - 1) / unit;
        of_memory = shape.remembered > 0 ? 1 : 0;
        joined = units + of_memory;
        square = rows * rows;
    }
    int64_t block_size() const {
        return rows * block;
    }
    // Runs fn(first, width) over the blocks of a unit of `positions`.
    template <class Fn>
    void for_each_block(int64_t first, int64_t end, Fn fn) const {
        for (; first < end; first += block) fn(first, first + block < end ? block : end - first);
    }
};

// exp(x) for x <= 0, below 2 ulp; 0 below 2^-125, and NaN stays.
DIFFKERN_INLINE f32v exp_of_difference(f32v x) {
    const f32v e = x < -87.0f ? f32v{} : exp_clamped(x);
    return x == x ? e : x;
}

// The larger one; b where a is NaN.
DIFFKERN_INLINE f32v larger(f32v a, f32v b) {
    return a > b ? a : b;
}
DIFFKERN_INLINE float largest(f32v v) {
    float most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// x becomes its softmax over the rows, times `scale`, for each of `width` columns.
inline void softmax_over_rows(float* x, int64_t rows, int64_t stride, int64_t width, float scale) {
    for (int64_t i = 0; i < width; i += kLanes) {
        f32v most = load(x + i), total = {};
        for (int64_t c = 1; c < rows; ++c) most = larger(load(x + c * stride + i), most);
        for (int64_t c = 0; c < rows; ++c) {
            const f32v e = exp_of_difference(load(x + c * stride + i) - most);
            store(x + c * stride + i, e);
            total += e;
        }
        const f32v factor = scale / total;
        for (int64_t c = 0; c < rows; ++c) store(x + c * stride + i, load(x + c * stride + i) * factor);
    }
}

// c[i][j] += sum over n of a[i][n] b[j][n] for i, j < rows, a multiple of four, and n < width, whole vectors.
inline void add_product_of_rows(const float* a, const float* b, int64_t rows, int64_t stride, int64_t width, float* c) {
    constexpr int kRows = kLanes == 16 ? 4 : 2;
    for (int64_t i = 0; i < rows; i += kRows)
        for (int64_t j = 0; j < rows; j += 4) {
            f32v total[kRows][4] = {};
            for (int64_t n = 0; n < width; n += kLanes) {
                f32v right[4];
                for (int k = 0; k < 4; ++k) right[k] = load(b + (j + k) * stride + n);
                for (int r = 0; r < kRows; ++r) {
                    const f32v left = load(a + (i + r) * stride + n);
                    for (int k = 0; k < 4; ++k) total[r][k] = multiply_add(left, right[k], total[r][k]);
                }
            }
            for (int r = 0; r < kRows; ++r) {
                float sums[4];
                sum_each(total[r], sums);
                for (int k = 0; k < 4; ++k) c[(i + r) * rows + j + k] += sums[k];
            }
        }
}

template <int kVectors>
DIFFKERN_INLINE void columns_of_product(const float* a, const float* b, int64_t depth, int64_t rows, int64_t stride,
                                        float* c) {
    for (int64_t i = 0; i < rows; i += 4) {
        f32v total[4][kVectors] = {};
        for (int64_t k = 0; k < depth; ++k) {
            f32v right[kVectors];
            for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * stride + v * kLanes);
            for (int r = 0; r < 4; ++r) {
                const f32v left = broadcast(a[k * rows + i + r]);
                for (int v = 0; v < kVectors; ++v) total[r][v] = multiply_add(left, right[v], total[r][v]);
            }
        }
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < kVectors; ++v) store(c + (i + r) * stride + v * kLanes, total[r][v]);
    }
}

// c[i][n] = sum over k < depth of a[k][i] b[k][n] for i < rows, a multiple of four, and n < width, whole vectors.
inline void product_over_rows(const float* a, const float* b, int64_t depth, int64_t rows, int64_t stride,
                              int64_t width, float* c) {
    constexpr int kVectors = kLanes == 16 ? 4 : 2;
    int64_t n = 0;
    for (; n + kVectors * kLanes <= width; n += kVectors * kLanes)
        columns_of_product<kVectors>(a, b + n, depth, rows, stride, c + n);
    for (; n < width; n += kLanes) columns_of_product<1>(a, b + n, depth, rows, stride, c + n);
}

// Runs fn(head, unit) for all units of all heads; head counts through the samples.
template <class Fn>
void for_each_unit(int64_t heads, int64_t units, int num_threads, Fn fn) {
    auto body = [&](int64_t task) { fn(task / units, task % units); };
    parallel_for(heads * units, num_threads, body);
}

inline void zero(float* x, int64_t count) {
    __builtin_memset(x, 0, static_cast<unsigned long>(count) * sizeof(float));
}

// The rows that fill up the last four of a block, which no head has.
inline void zero_spare_rows(float* block, const Cut& cut) {
    zero(block + cut.channels * cut.block, (cut.rows - cut.channels) * cut.block);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
