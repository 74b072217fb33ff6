// A call of linear_attention, forward and backward, with memory of exact size.
#pragma once

#include "cpu/linear_attention.h"
#include "tests/buffer.h"

namespace diffkern::tests {

enum class HeadsOrder { positions_innermost, channels_innermost, neither };
constexpr HeadsOrder kHeadsOrders[] = {HeadsOrder::positions_innermost, HeadsOrder::channels_innermost,
                                       HeadsOrder::neither};

// `parts` times (heads, channels) of every position of every sample.
struct PackedHeads {
    int64_t sample, head, channel, position;
    Buffer buffer;

    PackedHeads(const LinearAttentionShape& shape, int64_t positions, int64_t parts, HeadsOrder order, DType dtype,
                int64_t offset)
        : sample(parts * shape.heads * shape.channels * positions * (order == HeadsOrder::neither ? 2 : 1)),
          head(shape.channels),
          channel(1),
          position(parts * shape.heads * shape.channels),
          buffer(dtype, shape.samples * sample, offset) {
        if (order == HeadsOrder::channels_innermost) return;
        head *= positions;
        channel = positions;
        position = 1;
        if (order == HeadsOrder::positions_innermost) return;
        head *= 2;
        channel *= 2;
        position = 2;
    }
    int64_t index(int64_t n, int64_t h, int64_t c, int64_t i, int64_t part = 0, int64_t heads = 0) const {
        return n * sample + (part * heads + h) * head + c * channel + i * position;
    }
    HeadsView view(int64_t part = 0, int64_t heads = 0) const {
        return {buffer.data() + part * heads * head * size_of(buffer.dtype()),
                buffer.dtype(),
                sample,
                head,
                channel,
                position};
    }
};

struct LinearAttentionCase {
    LinearAttentionShape shape;
    DType dtype, memory_dtype;
    float scale;
    PackedHeads qkv, dout, out, dqkv;
    PackedHeads memory;  // keys and values, as a sample each
    Buffer context, k_max, k_sum, dmemory;

    LinearAttentionCase(const LinearAttentionShape& shape, DType dtype, HeadsOrder order, Random& random)
        : shape(shape),
          dtype(dtype),
          memory_dtype(random.coin() ? dtype : DType::f32),
          scale(static_cast<float>(random.real(0.3, 1))),
          qkv(shape, shape.positions, 3, order, dtype, random.below(2)),
          dout(shape, shape.positions, 1, kHeadsOrders[random.below(3)], dtype, random.below(2)),
          out(shape, shape.positions, 1, order == HeadsOrder::neither ? HeadsOrder::positions_innermost : order, dtype,
              random.below(2)),
          dqkv(shape, shape.positions, 3, order == HeadsOrder::neither ? HeadsOrder::positions_innermost : order, dtype,
               random.below(2)),
          memory({2, shape.heads, shape.channels, 0, 0}, shape.remembered, 1, kHeadsOrders[random.below(3)],
                 memory_dtype, random.below(2)),
          context(DType::f32, shape.samples * shape.heads * shape.channels * shape.channels),
          k_max(DType::f32, shape.samples * shape.heads * shape.channels),
          k_sum(DType::f32, k_max.count()),
          dmemory(DType::f32, 2 * shape.heads * shape.channels * shape.remembered) {
        random.fill(qkv.buffer, -2, 2);
        random.fill(dout.buffer, -1, 1);
        random.fill(memory.buffer, -2, 2);
    }

    LinearAttentionArgs forward_args(int num_threads) const {
        HeadsView keys{}, values{};
        if (shape.remembered) {
            keys = memory.view();
            values = keys;
            values.data += memory.sample * size_of(memory_dtype);
            keys.sample = values.sample = 0;
        }
        const auto part = [&](int64_t i) { return qkv.view(i, shape.heads); };
        return {shape,
                part(0),
                part(1),
                part(2),
                keys,
                values,
                scale,
                out.view(),
                context.as<float>(),
                k_max.as<float>(),
                k_sum.as<float>(),
                num_threads};
    }
    LinearAttentionBackwardArgs backward_args(int num_threads) const {
        const auto part = [&](int64_t i) { return dqkv.view(i, shape.heads); };
        LinearAttentionArgs forward = forward_args(num_threads);
        forward.out = {};
        return {forward, dout.view(), part(0), part(1), part(2), dmemory.as<float>()};
    }
    std::string describe() const {
        return text(shape.samples, " samples of ", shape.heads, " heads of ", shape.channels, ", ", shape.positions,
                    " positions and ", shape.remembered, " remembered, ", name_of(dtype), " and ",
                    name_of(memory_dtype));
    }
};

}  // namespace diffkern::tests
