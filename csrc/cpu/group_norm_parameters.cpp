// The gradients of group_norm's parameters from the two sums per (sample, channel) of its backward pass: N x C values,
// so on one thread. Sums over the batch are in double and in order.
#include "cpu/group_norm_math.h"

namespace diffkern {
namespace DIFFKERN_ISA {

constexpr int64_t kColumns = 64;

// Channels first .. first + count, count <= kColumns.
static void columns(const GroupNormParameterArgs& args, int64_t first, int64_t count) {
    const GroupNormArgs& fwd = args.backward.forward;
    const int64_t channels = fwd.shape.channels;
    double weight[kColumns] = {}, bias[kColumns] = {};
    float scale[kColumns], weights[kColumns], biases[kColumns];
    if (args.scale) {
        load_row(fwd.weight, 0, first, count, 1.0f, weights);
        load_row(fwd.bias, 0, first, count, 0.0f, biases);
    }
    for (int64_t n = 0; n < fwd.shape.samples; ++n) {
        const float* dz = args.backward.sum_dz + n * channels + first;
        const float* dz_xhat = args.backward.sum_dz_xhat + n * channels + first;
        load_row(fwd.scale, n, first, count, 0.0f, scale);
        for (int64_t c = 0; c < count; ++c) {
            weight[c] += (1.0 + scale[c]) * dz_xhat[c];
            bias[c] += (1.0 + scale[c]) * dz[c];
        }
        if (args.scale) {
            float* out = args.scale + n * channels + first;
            for (int64_t c = 0; c < count; ++c) out[c] = weights[c] * dz_xhat[c] + biases[c] * dz[c];
        }
        if (args.shift) {
            float* out = args.shift + n * channels + first;
            for (int64_t c = 0; c < count; ++c) out[c] = dz[c];
        }
    }
    for (int64_t c = 0; c < count; ++c) {
        if (args.weight) args.weight[first + c] = static_cast<float>(weight[c]);
        if (args.bias) args.bias[first + c] = static_cast<float>(bias[c]);
    }
}

void group_norm_parameter_gradients(const GroupNormParameterArgs& args) {
    const int64_t channels = args.backward.forward.shape.channels;
    for (int64_t first = 0; first < channels; first += kColumns)
        columns(args, first, channels - first < kColumns ? channels - first : kColumns);
}

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
