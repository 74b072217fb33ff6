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

// How many groups of `size`, the last maybe smaller, `n` make.
constexpr int64_t groups_of(int64_t size, int64_t n) {
    return (n + size - 1) / size;
}

constexpr int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// A task's memory, cut into arrays that begin on cache lines.
class Arena {
 public:
    struct Array {
        float** data;
        int64_t size;
    };
    template <int kCount>
    explicit Arena(const Array (&arrays)[kCount]) : memory_(total(arrays, kCount)) {
        const auto address = reinterpret_cast<uintptr_t>(static_cast<float*>(memory_));
        float* next = memory_ + static_cast<int64_t>((64 - address % 64) % 64 / sizeof(float));
        for (const Array& array : arrays) {
            *array.data = next;
            next += round_up(array.size, kLine);
        }
    }

 private:
    static constexpr int64_t kLine = 16;
    static int64_t total(const Array* arrays, int count) {
        int64_t floats = kLine;
        for (int i = 0; i < count; ++i) floats += round_up(arrays[i].size, kLine);
        return floats;
    }
    Scratch<float> memory_;
};

// Rows taken together where they lie side by side: whole cache lines, which a stride of a power of two would not let
// stay until their next part is wanted.
constexpr int64_t kTogether = 32;

// Four rows, of which `rows` exist and the others are zero, into columns `width` apart.
template <class T>
DIFFKERN_INLINE void pack_quad(const T* in, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride,
                               float factor, int64_t width, float* out) {
    int64_t c = 0;
    if (rows >= 4 && column_stride == 1) {
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
    const auto at = [&](int64_t row) { return out + row / width * width * columns + row % width; };
    int64_t first = 0;
    if (row_stride == 1) {
        while (first + 4 <= rows) {
            const int64_t end = first + kTogether <= rows ? first + kTogether : rows / 4 * 4;
            float* panels[kTogether / 4];
            for (int64_t i = first; i < end; i += 4) panels[(i - first) / 4] = at(i);
            for (int64_t c = 0; c < columns; ++c)
                for (int64_t i = first; i < end; i += 4)
                    store_quad(panels[(i - first) / 4] + c * width, load_quad(in + i + c * column_stride) * factor);
            first = end;
        }
    }
    for (; first < round_up(rows, width); first += 4)
        pack_quad(in + first * row_stride, rows - first, row_stride, columns, column_stride, factor, width, at(first));
}

// Four rows of a packed matrix, a row of which holds `columns` numbers, into rows that lie side by side.
template <class T>
DIFFKERN_INLINE void unpack_quad(const float* in, int64_t width, int64_t columns, T* out, int64_t column_stride) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
        quad v[4];
        for (int i = 0; i < 4; ++i) v[i] = load_quad(in + i * width + c);
        transpose(v);
        for (int i = 0; i < 4; ++i) store_quad(out + (c + i) * column_stride, v[i]);
    }
    for (; c < columns; ++c)
        for (int i = 0; i < 4; ++i) store_value(out + c * column_stride + i, in[i * width + c]);
}

// A packed matrix whose rows lie `width` apart, back into a tensor.
template <class T>
void unpack(const float* in, int64_t width, int64_t rows, int64_t columns, T* out, int64_t row_stride,
            int64_t column_stride) {
    int64_t r = 0;
    if (column_stride == 1) {
        for (; r < rows; ++r)
            for_lanes(0, columns, [&](int64_t c, int n) DIFFKERN_LAMBDA {
                store_n(out + r * row_stride + c, load_n(in + r * width + c, n), n);
            });
    } else if (row_stride == 1) {
        while (r + 4 <= rows) {
            const int64_t end = r + kTogether <= rows ? r + kTogether : rows / 4 * 4;
            for (int64_t c = 0; c < columns; c += 4)
                for (int64_t i = r; i < end; i += 4)
                    unpack_quad(in + i * width + c, width, columns - c < 4 ? columns - c : 4,
                                out + i + c * column_stride, column_stride);
            r = end;
        }
    }
    for (; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) store_value(out + r * row_stride + c * column_stride, in[r * width + c]);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
