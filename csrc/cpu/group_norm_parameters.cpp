// The gradients of group_norm's parameters from the two sums per (sample, channel) of its backward pass. N x C values:
// plain C++, compiled once. Sums over the batch are in double and in order.
#include "cpu/group_norm.h"

namespace diffkern {

void group_norm_parameter_gradients(const GroupNormBackwardArgs& args, const GroupNormParameterGradients& grads) {
    const GroupNormArgs& fwd = args.forward;
    const int64_t samples = fwd.shape.samples, channels = fwd.shape.channels;
    for (int64_t c = 0; c < channels; ++c) {
        double weight = 0, bias = 0;
        for (int64_t n = 0; n < samples; ++n) {
            const float dz = args.sum_dz[n * channels + c], dz_xhat = args.sum_dz_xhat[n * channels + c];
            const double factor = 1.0 + read(fwd.scale, n, c, 0.0f);
            weight += factor * dz_xhat;
            bias += factor * dz;
            if (grads.scale) {
                grads.scale[n * channels + c] =
                    read(fwd.weight, n, c, 1.0f) * dz_xhat + read(fwd.bias, n, c, 0.0f) * dz;
            }
            if (grads.shift) grads.shift[n * channels + c] = dz;
        }
        if (grads.weight) grads.weight[c] = static_cast<float>(weight);
        if (grads.bias) grads.bias[c] = static_cast<float>(bias);
    }
}

}  // namespace diffkern
