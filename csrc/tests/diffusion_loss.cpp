// diffusion_loss: w mean((m - target)^2) and its gradient in m, for every target, type and memory order.
#include "tests/diffusion_loss_case.h"
#include "tests/probe.h"

namespace diffkern::tests {
namespace {

int lanes() {
    int lanes = 0;
    probe_lanes({&lanes});
    return lanes;
}

void check_loss(const DiffusionLossCase& loss) {
    for (int64_t sample = 0; sample < loss.shape.samples; ++sample) {
        const Bounded expected = loss.expected_loss(sample, lanes());
        CHECK(expected.allows(loss.loss.get(sample), DType::f32), loss.describe(), " sample ", sample, ": ",
              loss.loss.get(sample), " for ", expected.value, " +- ", expected.error);
    }
}

void check_grad(const DiffusionLossCase& loss) {
    for (int64_t sample = 0; sample < loss.shape.samples; ++sample)
        for (int64_t i = 0; i < loss.grad.size; ++i) {
            const Bounded expected = loss.expected_grad(sample, i);
            CHECK(expected.allows(loss.grad.at(sample, i), loss.grad.buffer.dtype()), loss.describe(),
                  " gradient of sample ", sample, " position ", i, ": ", loss.grad.at(sample, i), " for ",
                  expected.value, " +- ", expected.error);
        }
    CHECK(loss.grad.gaps_are_untouched(), loss.describe());
}

// The loss alone first, then with its gradient: which gives the same loss.
void check_case(const DiffusionLossCase& loss) {
    diffusion_loss(loss.args(false, 1));
    check_loss(loss);
    const Buffer alone = loss.loss;
    diffusion_loss(loss.args(true, 1));
    CHECK(loss.loss.same_bits(alone), loss.describe(), ": another loss with the gradient");
    check_grad(loss);
}

}  // namespace

TEST(diffusion_loss, is_the_formula) {
    Random random(21);
    for (const SampleShape& shape : shapes())
        for (const bool channels_last : {false, true})
            for (const DType dtype : kFloat32AndBelow)
                for (const LossTarget target : kTargets)
                    for (const bool generated : {false, true})
                        check_case({in_format(shape, channels_last), target, dtype, generated, random});
}

// Operands that are all float32 have a road of their own.
TEST(diffusion_loss, all_float32) {
    Random random(22);
    for (const SampleShape& shape : shapes())
        for (const bool channels_last : {false, true})
            for (const LossTarget target : kTargets) {
                const DType f32 = DType::f32;
                check_case({in_format(shape, channels_last), target, f32, random.coin(), random, f32});
            }
}

// More chunks in a sample than it has parts.
TEST(diffusion_loss, large_samples) {
    Random random(23);
    for (const bool channels_last : {false, true})
        for (const LossTarget target : kTargets)
            check_case({{2, 3, 50001, channels_last}, target, DType::f32, false, random});
}

TEST(diffusion_loss, nan_stays_in_its_sample) {
    Random random(24);
    for (const SampleShape& shape : {SampleShape{3, 3, 7, false}, SampleShape{3, 5, 2001, true}})
        for (const LossTarget target : kTargets) {
            DiffusionLossCase loss(shape, target, DType::f32, target == LossTarget::v, random);
            loss.model_output.buffer.set(loss.model_output.stride + 20, std::nan(""));
            check_case(loss);
            CHECK(std::isnan(loss.loss.get(1)) && std::isnan(loss.grad.at(1, 20)), loss.describe());
        }
}

// The mean over nothing is NaN, as torch's.
TEST(diffusion_loss, empty_samples) {
    Random random(25);
    for (const bool channels_last : {false, true})
        for (const LossTarget target : kTargets)
            for (const bool with_grad : {false, true})
                for (const SampleShape& shape : {SampleShape{2, 3, 0, channels_last}, {2, 0, 3, channels_last}}) {
                    const DiffusionLossCase empty(shape, target, DType::f32, true, random);
                    empty.loss.as<float>()[0] = empty.loss.as<float>()[1] = 0;
                    diffusion_loss(empty.args(with_grad, 1));
                    CHECK(std::isnan(empty.loss.get(0)) && std::isnan(empty.loss.get(1)), empty.describe());
                }
}

TEST(diffusion_loss, no_samples) {
    for (const bool channels_last : {false, true})
        for (const LossTarget target : kTargets) {
            DiffusionLossArgs args{};
            args.shape = {0, 3, 5, channels_last};
            args.target = target;
            args.num_threads = 1;
            diffusion_loss(args);
        }
}

}  // namespace diffkern::tests
