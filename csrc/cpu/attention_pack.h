// Between tensors of any strides and storage type and the float32 panels that attention's kernels read and write.
#pragma once

#include "cpu/attention.h"
#include "cpu/quad.h"
#include "cpu/scratch.h"

namespace diffkern {
namespace DIFFKERN_ISA {

// One head of a tensor: element (row, channel) at data[row * row_stride + channel * channel_stride].
template <class T>
struct Head {
    T* data;
    int64_t row_stride, channel_stride;

    Head(const AttentionView& view, int64_t batch, int64_t head)
        : data(reinterpret_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride),
          row_stride(view.row_stride),
          channel_stride(view.channel_stride) {
    }
};

constexpr int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// A task's memory, cut into arrays that begin on cache lines.
class Arena {
 public:
    // Of all arrays together, each rounded up to whole lines.
    explicit Arena(int64_t floats) : memory_(floats + kLine) {
        const auto address = reinterpret_cast<uintptr_t>(static_cast<float*>(memory_));
        next_ = memory_ + static_cast<int64_t>((64 - address % 64) % 64 / 4);
    }
    float* take(int64_t floats) {
        float* array = next_;
        next_ += line_up(floats);
        return array;
    }
    static constexpr int64_t line_up(int64_t floats) {
        return round_up(floats, kLine);
    }

 private:
    static constexpr int64_t kLine = 16;
    Scratch<float> memory_;
    float* next_;
};

// Four rows, of which `rows` exist and the others are zero, into columns `width` apart.
template <class T>
DIFFKERN_INLINE void pack_quad(const T* in, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride,
                               float factor, int64_t width, float* out) {
    int64_t c = 0;
    if (rows >= 4 && row_stride == 1) {
        for (; c < columns; ++c) store_quad(out + c * width, load_quad(in + c * column_stride) * factor);
    } else if (rows >= 4 && column_stride == 1) {
        for (; c + 4 <= columns; c += 4) {
            quad v[4];
            for (int i = 0; i < 4; ++i) v[i] = load_quad(in + i * row_stride + c) * factor;
            transpose(v);
            for (int i = 0; i < 4; ++i) store_quad(out + (c + i) * width, v[i]);
        }
    }
    for (; c < columns; ++c)
        for (int i = 0; i < 4; ++i)
            out[c * width + i] = i < rows ? to_float(in[i * row_stride + c * column_stride]) * factor : 0.0f;
}

// The matrix, times a factor, as panels of `width` rows (a multiple of four): out[panel][column][row of the panel].
// Rows that fill up the last panel are zero.
template <class T>
void pack(const T* in, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride, float factor,
          int64_t width, float* out) {
    for (int64_t first = 0; first < rows; first += width, out += columns * width)
        for (int64_t i = 0; i < width; i += 4)
            pack_quad(in + (first + i) * row_stride, rows - first - i, row_stride, columns, column_stride, factor,
                      width, out + i);
}

// A packed matrix whose rows lie `width` apart, back into a tensor.
template <class T>
void unpack(const float* in, int64_t width, int64_t rows, int64_t columns, T* out, int64_t row_stride,
            int64_t column_stride) {
    if (column_stride == 1) {
        for (int64_t r = 0; r < rows; ++r)
            for_lanes(0, columns, [&](int64_t c, int n) DIFFKERN_LAMBDA {
                store_n(out + r * row_stride + c, load_n(in + r * width + c, n), n);
            });
        return;
    }
    int64_t r = 0;
    if (row_stride == 1) {
        for (; r + 4 <= rows; r += 4) {
            int64_t c = 0;
            for (; c + 4 <= columns; c += 4) {
                quad v[4];
                for (int i = 0; i < 4; ++i) v[i] = load_quad(in + (r + i) * width + c);
                transpose(v);
                for (int i = 0; i < 4; ++i) store_quad(out + r + (c + i) * column_stride, v[i]);
            }
            for (; c < columns; ++c)
                for (int i = 0; i < 4; ++i) store_value(out + r + i + c * column_stride, in[(r + i) * width + c]);
        }
    }
    for (; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) store_value(out + r * row_stride + c * column_stride, in[r * width + c]);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
