// Every op on 1 to 4 threads: bitwise the same results, and under ThreadSanitizer no race.
#include "cpu/philox_normal.h"
#include "cpu/q_sample.h"
#include "tests/attention_case.h"
#include "tests/channel_rms_norm_case.h"
#include "tests/diffusion_loss_case.h"
#include "tests/group_norm_case.h"
#include "tests/linear_attention_case.h"
#include "tests/rescale_case.h"
#include "tests/solver_case.h"
#include "tests/thread_pool.h"
#include "tests/threshold_case.h"
#include "tests/vb_terms_case.h"

namespace diffkern::tests {
namespace {

// run(num_threads) makes its inputs anew and returns what the op wrote.
template <class Run>
void check_threads(const char* op, Run run) {
    const WithThreads with_threads;
    const std::vector<Buffer> expected = run(1);
    for (int num_threads = 2; num_threads <= 4; ++num_threads) {
        const std::vector<Buffer> actual = run(num_threads);
        for (size_t i = 0; i < expected.size(); ++i)
            CHECK(actual[i].same_bits(expected[i]), op, ": output ", i, " on ", num_threads, " threads");
    }
}

// More tasks than threads in one sample; and in few samples that are each one task.
constexpr SampleShape kThreaded[] = {{1, 5, 2001, false}, {1, 5, 2001, true}, {3, 7, 100, false}, {5, 7, 33, true}};

}  // namespace

TEST(threads, philox_normal) {
    for (const SampleShape& shape : kThreaded)
        for (const DType dtype : kDtypes)
            check_threads("philox_normal", [&](int num_threads) {
                Random random(12);
                const Source source(shape.samples, random);
                const Tensor out(dtype, shape);
                philox_normal({shape, source.args(), out.operand(), nullptr, num_threads});
                return std::vector<Buffer>{out.buffer};
            });
}

TEST(threads, philox_uint32) {
    check_threads("philox_uint32", [](int num_threads) {
        Random random(13);
        const SampleShape shape = {6, 3, 50, false};
        const Source source(shape.samples, random);
        const Buffer words(DType::f64, 6 * 3 * 50);
        philox_uint32({shape, source.args(), {}, words.as<int64_t>(), num_threads});
        return std::vector<Buffer>{words};
    });
}

TEST(threads, q_sample) {
    for (const SampleShape& shape : kThreaded)
        for (const DType dtype : kDtypes)
            check_threads("q_sample", [&](int num_threads) {
                Random random(14);
                const Source source(shape.samples, random);
                Tensor x0(dtype, shape), x_t(dtype, shape), noise_out(dtype, shape);
                x0.fill(random, -1, 1);
                const std::vector<int64_t> t(static_cast<size_t>(shape.samples), 0);
                const double signal = 0.6, sigma = 0.8;
                q_sample({shape,
                          x0.operand(),
                          {},
                          source.args(),
                          t.data(),
                          &signal,
                          &sigma,
                          x_t.operand(),
                          noise_out.operand(),
                          num_threads});
                return std::vector<Buffer>{x_t.buffer, noise_out.buffer};
            });
}

TEST(threads, solver_step) {
    for (const SampleShape& shape : kThreaded)
        for (const DType dtype : kDtypes)
            for (uint64_t seed = 0; seed < 4; ++seed)
                check_threads("solver_step", [&](int num_threads) {
                    Random random(seed);
                    const SolverCase solver(shape, dtype, random);
                    solver_step(solver.args(num_threads));
                    std::vector<Buffer> written{(solver.out ? solver.out : solver.x)->buffer};
                    if (solver.x_in) written.push_back(solver.x_in->buffer);
                    for (const TensorPtr& slot : solver.slots) written.push_back(slot->buffer);
                    return written;
                });
}

TEST(threads, guidance_rescale) {
    for (const SampleShape& shape : kThreaded)
        for (const DType dtype : kDtypes)
            check_threads("guidance_rescale", [&](int num_threads) {
                Random random(17);
                const RescaleCase guidance(shape, dtype, 3, random);
                guidance_rescale(guidance.args(num_threads));
                return std::vector<Buffer>{guidance.rescale};
            });
}

TEST(threads, dynamic_threshold) {
    for (const SampleShape& shape : kThreaded)
        for (const DType dtype : kDtypes)
            check_threads("dynamic_threshold", [&](int num_threads) {
                Random random(18);
                const ThresholdCase step(shape, dtype, random);
                dynamic_threshold(step.args(num_threads));
                return std::vector<Buffer>{step.threshold};
            });
}

// Also more chunks in a sample than it has parts.
TEST(threads, diffusion_loss) {
    std::vector<SampleShape> threaded(std::begin(kThreaded), std::end(kThreaded));
    threaded.push_back({2, 3, 50001, false});
    for (const SampleShape& shape : threaded)
        for (const LossTarget target : kTargets)
            for (const DType dtype : kFloat32AndBelow)
                check_threads("diffusion_loss", [&](int num_threads) {
                    Random random(16);
                    const DiffusionLossCase loss(shape, target, dtype, true, random);
                    diffusion_loss(loss.args(true, num_threads));
                    return std::vector<Buffer>{loss.loss, loss.grad.buffer};
                });
}

TEST(threads, vb_terms) {
    for (const SampleShape& shape : kThreaded)
        for (const bool learned : {false, true})
            for (const DType dtype : kFloat32AndBelow)
                check_threads("vb_terms", [&](int num_threads) {
                    Random random(19);
                    const VbTermsCase bound(shape, Made::of_both, learned, false, dtype, random);
                    vb_terms(bound.args(true, num_threads));
                    return std::vector<Buffer>{bound.terms, bound.grad_mean.buffer, bound.grad_variance.buffer};
                });
}

TEST(threads, group_norm) {
    for (const GroupNormShape& size :
         {GroupNormShape{1, 64, 1100, 8}, GroupNormShape{3, 48, 700, 4}, GroupNormShape{9, 40, 130, 5}})
        for (const bool channels_last : {false, true})
            for (const DType dtype : kFloat32AndBelow)
                check_threads("group_norm", [&](int num_threads) {
                    Random random(15);
                    const GroupNormCase norm(size, channels_last, dtype, 0.5, random);
                    group_norm(norm.forward_args(num_threads));
                    group_norm_backward(norm.backward_args(num_threads));
                    return std::vector<Buffer>{norm.y,     norm.mean,   norm.rstd,        norm.dx,
                                               norm.dskip, norm.sum_dz, norm.sum_dz_xhat, norm.doffset};
                });
}

TEST(threads, channel_rms_norm) {
    for (const SampleShape& size : {SampleShape{1, 64, 1100}, SampleShape{3, 48, 700}, SampleShape{9, 40, 130}})
        for (const bool channels_last : {false, true})
            for (const DType dtype : kFloat32AndBelow)
                check_threads("channel_rms_norm", [&](int num_threads) {
                    Random random(17);
                    const ChannelRmsNormCase norm(in_format(size, channels_last), dtype, random);
                    channel_rms_norm(norm.forward_args(num_threads));
                    channel_rms_norm_backward(norm.backward_args(num_threads));
                    return std::vector<Buffer>{norm.y, norm.norm, norm.dx, norm.dweight, norm.dscale, norm.dshift};
                });
}

// Also heads that are fewer than threads, and blocks of queries that do not divide evenly.
TEST(threads, attention) {
    for (const AttentionSize& size : {AttentionSize{1, 1, 700, 90, 9}, AttentionSize{2, 3, 150, 70, 20},
                                      AttentionSize{3, 3, 12, 33, 8}, AttentionSize{1, 2, 40, 33, 70}})
        for (const HeadLayout layout : kHeadLayouts)
            for (const DType dtype : kFloat32AndBelow)
                check_threads("attention", [&](int num_threads) {
                    Random random(18);
                    const AttentionCase of(size, layout, dtype, random);
                    attention(of.forward_args(num_threads));
                    attention_backward(of.backward_args(num_threads));
                    return std::vector<Buffer>{of.out.buffer, of.lse, of.dq.buffer, of.dk.buffer, of.dv.buffer};
                });
}

// Several units of a head; and one of each of several heads.
TEST(threads, linear_attention) {
    for (const LinearAttentionShape& shape :
         {LinearAttentionShape{1, 1, 32, 5000, 4}, LinearAttentionShape{3, 2, 8, 300, 0}})
        for (const HeadsOrder order : kHeadsOrders)
            for (const DType dtype : kFloat32AndBelow)
                check_threads("linear_attention", [&](int num_threads) {
                    Random random(21);
                    const LinearAttentionCase attention(shape, dtype, order, random);
                    linear_attention(attention.forward_args(num_threads));
                    linear_attention_backward(attention.backward_args(num_threads));
                    return std::vector<Buffer>{attention.out.buffer, attention.context,     attention.k_max,
                                               attention.k_sum,      attention.dqkv.buffer, attention.dmemory};
                });
}

}  // namespace diffkern::tests
