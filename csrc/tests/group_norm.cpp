// group_norm forward: output, mean and rstd against the formulas, in both memory formats and every storage type.
#include "tests/group_norm_case.h"

namespace diffkern::tests {
namespace {

double activation(const GroupNormCase& norm, double z) {
    return norm.silu ? z / (1 + std::exp(-z)) : z;
}

void check_forward(const GroupNormCase& norm) {
    group_norm(norm.forward_args(1));
    for (int64_t sample = 0; sample < norm.shape.samples; ++sample)
        for (int64_t group = 0; group < norm.num_groups; ++group) {
            const Statistics exact(norm, sample, group);
            const double mean = norm.mean.get(sample * norm.num_groups + group);
            const double rstd = norm.rstd.get(sample * norm.num_groups + group);
            CHECK(std::fabs(mean - exact.mean) <= kUnit * (std::fabs(exact.mean) + kPerSum * std::sqrt(exact.variance)),
                  mean, " for ", exact.mean, ", ", norm.describe());
            // d rstd / rstd is half of d variance / variance.
            CHECK(std::fabs(rstd / exact.rstd - 1) <= kUnit * kPerSum, rstd, " for ", exact.rstd, ", ",
                  norm.describe());
            for (int64_t c = group * norm.per_group(); c < (group + 1) * norm.per_group(); ++c) {
                const Affine affine(norm, sample, c);
                for (int64_t p = 0; p < norm.shape.pixels; ++p) {
                    const int64_t i = norm.position(sample, c, p);
                    const double xhat = (norm.input(sample, c, p) - exact.mean) * exact.rstd;
                    const double y = activation(norm, xhat * affine.gamma + affine.beta);
                    // silu's slope is at most 1.1, and it is off by four epsilons itself (vec.cpp).
                    const double of_z = z_error(affine, xhat_error(xhat));
                    const double error = norm.silu ? 1.1 * of_z + 8 * kUnit * std::fabs(y) : of_z;
                    CHECK(Bounded(y, error, kFloat).allows(norm.y.get(i), norm.dtype), "channel ", c, " pixel ", p,
                          ": ", norm.y.get(i), " for ", y, " +- ", error, ", ", norm.describe());
                }
            }
        }
}

}  // namespace

TEST(group_norm, is_the_formula) {
    Random random(8);
    for (const GroupNormShape& size : group_norm_shapes())
        for (const bool channels_last : {false, true})
            for (const DType dtype : kFloat32AndBelow)
                check_forward(GroupNormCase(size, channels_last, dtype, 0.5, random));
}

// Where the mean is a thousand times the spread, or more, nothing is lost: sum(x^2) - mean^2 would be.
TEST(group_norm, large_means) {
    Random random(9);
    for (const GroupNormShape& size : group_norm_shapes())
        for (const bool channels_last : {false, true})
            for (const double center : {1e3, -1e5})
                check_forward(GroupNormCase(size, channels_last, DType::f32, center, random));
}

}  // namespace diffkern::tests
